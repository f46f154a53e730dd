"""Engine: one model, loaded once; takes prompts, returns answers (or features, or logits). The
public Python API."""

from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from models.family import Prompt
from runtime.common.errors import ToolkitError
from runtime.engine.loading.build import build
from runtime.engine.loading.memory import DEFAULT_MAX_NUM_SEQS
from runtime.parallel.team import close_team
from runtime.vision import open_session

from .image_features import ImageFeatures
from .options import EngineOptions, SamplingParams
from .request import Request, Result, Settings
from .scheduler import Scheduler
from .sequence import Sequence


class Engine:
    """Engine(model_dir, **fields of options.EngineOptions). Loading reads the decoder; the vision
    session opens with the first image. Raises ToolkitError or ModelError, each one sentence, before
    memory is touched where that is possible.
    """

    def __init__(self, model_dir, **options):
        parts = build(model_dir, EngineOptions(**options), load=Engine.of_rank)
        self.options = parts.options
        self.family = parts.family
        self.max_model_len = parts.max_model_len
        self.plan = parts.plan
        self.checkpoint = parts.checkpoint
        self.split = parts.split
        self.last_result = None
        self._ops = parts.ops
        self._team = parts.team
        self._current_layer = parts.current_layer
        self._runner = parts.runner
        self._cache = parts.runner.cache
        self._image_features = ImageFeatures(
            partial(
                open_session,
                self.options.vision,
                self.family,
                self.checkpoint,
                self.options.artifact,
                device=self.options.device,
                precision=self.options.vision_precision,
                judge_om=self.options.judge_om,
            )
        )
        self._scheduler = Scheduler(
            self._runner,
            self._image_features.timed,
            self.options.max_num_seqs or DEFAULT_MAX_NUM_SEQS,
            self.options.max_num_batched_tokens,
        )

    @classmethod
    def from_options(cls, model_dir, options: EngineOptions) -> "Engine":
        return cls(model_dir, **vars(options))

    @classmethod
    def of_rank(cls, model_dir: str, options: dict) -> "Engine":
        """On ranks other than 0: the part of the model that rank 0 loads with these options."""
        return cls(model_dir, **options)

    # prompts

    def prompt(
        self, messages, language: str | None = None, tools: list[dict] | None = None
    ) -> Prompt:
        """Chat messages -> Prompt. content: text, or parts {"type": "image", "image": path | PIL}
        and {"type": "text", ...}.

        tools: functions the model may call, as OpenAI describes them.
        """
        if language not in (None, *self.family.languages):
            raise ToolkitError(
                f"{self.family.name} has no prompt wording for language {language!r}; "
                f"use one of {', '.join(self.family.languages)}"
            )
        prompt = self.family.prompt(messages, language or self.family.languages[0], tools)
        self._check_ids(prompt)
        return prompt

    def prompt_from_ids(self, ids, pixels=None, image_starts=None) -> Prompt:
        """Already tokenised: ids as the original implementation feeds its model, pixels as its
        preprocessor returns them."""
        prompt = self.family.prompt_from_ids(ids, pixels, image_starts)
        self._check_ids(prompt)
        return prompt

    def _check_ids(self, prompt: Prompt):
        """ToolkitError for an id that the model has no embedding of."""
        known = self.family.decoder.vocab_size
        bad = prompt.ids[(prompt.ids < 0) | (prompt.ids >= known)]
        if len(bad):
            raise ToolkitError(f"token id {bad[0]} is outside the vocabulary of {known}")

    def check_length(self, prompt: Prompt, max_tokens: int = 1):
        """ToolkitError for a prompt that is empty or leaves no room for `max_tokens` new tokens."""
        if len(prompt.ids) == 0:
            raise ToolkitError("the prompt is empty; give --prompt some text")
        if len(prompt.ids) + max_tokens > self.max_model_len:
            raise ToolkitError(
                f"prompt of {len(prompt.ids)} tokens + {max_tokens} new tokens exceed the maximum length "
                f"{self.max_model_len}; shorten the prompt or lower --max-tokens"
            )

    def settings(self, prompt: Prompt, params: SamplingParams) -> Settings:
        """`params` with every gap filled from the release's defaults."""
        defaults = self.family.sampling(bool(prompt.pixels))
        chosen = {}
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            given = getattr(params, name)
            chosen[name] = getattr(defaults, name) if given is None else given
        max_tokens = params.max_tokens
        if max_tokens is None:
            limit = min(defaults.max_length, self.max_model_len)
            if len(prompt.ids) >= limit:
                limit = self.max_model_len
            max_tokens = max(limit - len(prompt.ids), 1)
            if defaults.max_new_tokens:
                max_tokens = min(max_tokens, defaults.max_new_tokens)
        self.check_length(prompt, max_tokens)
        return Settings(
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            max_tokens=max_tokens,
            **chosen,
        )

    # results

    def features(self, prompt: Prompt) -> np.ndarray:
        """float32 [images * rows, hidden], as spliced into the sequence."""
        if not prompt.pixels:
            return np.zeros((0, self.family.decoder.hidden), np.float32)
        return np.concatenate(self._image_features.of(prompt))

    def prefill_logits(self, prompt: Prompt) -> np.ndarray:
        """float32 [T, vocab]: the logits of every prompt position."""
        self.check_length(prompt, 0)
        with self._sequence(prompt, 0) as sequence:
            features = self._image_features.of(prompt)
            return self._runner.prefill(sequence, features, all_logits=True).numpy()

    def score(self, prompt: Prompt, token_ids) -> np.ndarray:
        """Teacher-forced decoding: float32 [n, vocab], row i predicts token_ids[i] after the prompt
        and token_ids[:i]."""
        token_ids = [int(t) for t in token_ids]
        self.check_length(prompt, len(token_ids))
        with self._sequence(prompt, len(token_ids)) as sequence:
            features = self._image_features.of(prompt)
            if self._current_layer:
                return self._current_layer.score(self._runner, sequence, features, token_ids)
            rows = [self._runner.prefill(sequence, features)]
            rows += [self._runner.decode([sequence], [token]) for token in token_ids[:-1]]
            return np.concatenate([row.numpy() for row in rows])

    def generate(
        self, prompts: list[Prompt], params: SamplingParams | list[SamplingParams] | None = None
    ) -> list[Result]:
        """Answers in the order of the prompts, decoded together; params: for all, or one each."""
        each = params if isinstance(params, list) else [params] * len(prompts)
        requests = [
            self._request(prompt, chosen) for prompt, chosen in zip(prompts, each, strict=True)
        ]
        for _ in self._run(requests):
            pass
        return [request.result for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None):
        """Yields the answer's text in pieces; afterwards `last_result` is the whole Result."""
        request = self._request(prompt, params)
        shown = 0
        for _ in self._run([request]):
            piece = request.result.text[shown:]
            shown = len(request.result.text)
            if piece:
                yield piece
        self.last_result = request.result

    # many requests at once, e.g. in a server: add at any time, step while busy

    def add(self, prompt: Prompt, params: SamplingParams | None = None) -> Request:
        """Queue a request; `step` computes it. Its `result` grows until `finished`."""
        request = self._request(prompt, params)
        self._scheduler.add(request)
        return request

    def step(self) -> list[tuple[Request, str]]:
        """One pass of the decoder over the requests that have room: (request, new text) of each
        that got a token or ended; a request that failed has finish_reason "error" and says why in
        `error`."""
        return self._scheduler.step()

    def cancel(self, request: Request):
        """End a request; what it has of its answer stays in its result."""
        self._scheduler.cancel(request)

    @property
    def busy(self) -> bool:
        return self._scheduler.busy

    def load(self) -> tuple[int, int, float]:
        """Requests that run, requests that wait, share of the cache's blocks in use."""
        used = self._cache.used_blocks
        free = self._cache.free_blocks
        return len(self._scheduler.running), len(self._scheduler.waiting), used / (used + free)

    def take_cache_memory(self):
        """Take the KV cache's memory now, rather than block by block as requests first use it. For
        processes that live long; only before the first request."""
        self._cache.take_memory()

    def describe(self) -> list[str]:
        """One line per stage: what runs where."""
        options = self.options
        dtype = str(self.plan.dtype).removeprefix("torch.")
        where = options.device
        if options.tensor_parallel_size > 1:
            where += f" and {options.tensor_parallel_size - 1} more (tensor parallel)"
        packed = ""
        if options.cpu_weights != "float":
            packed = f", weights packed to {options.cpu_weights}"
        remark = self._ops.remark(self.plan.dtype)
        return [
            f"model: {self.family.name} ({self.family.rule})",
            f"decoder: {self._ops.name} ops on {where}, {dtype}{packed}{remark}",
            *self._image_features.describe(),
        ]

    @property
    def vision_seconds(self) -> float:
        """What the vision encoder has taken so far; opening it does not count."""
        return self._image_features.seconds

    def unverified_encoder(self) -> Path | None:
        """The artifact or .om in use that was never compared with torch; None: there is none."""
        return self._image_features.unverified()

    def peak_device_bytes(self) -> int | None:
        """Most memory of the device that this process has had; None where that is the host's."""
        return self._ops.peak_bytes()

    def close(self):
        """Give the decoder's memory back, and end the processes it was split over. The engine is of
        no use afterwards."""
        self._runner = None
        self._cache = None
        self._scheduler = None
        self._image_features.close()
        if self._team:
            close_team()

    # the decoder itself, for measurements and comparisons

    @property
    def decoder(self):
        """The loaded models.network.decoder.Decoder: on this rank, its part of the model."""
        return self._runner.decoder

    def tap(self, tap=None) -> list[str]:
        """From now on `tap(stage, x)` sees the residual stream x [T, hidden] behind every stage of
        the decoder, and the next stage gets what it returns; None ends that. Returns the stages in
        order. ToolkitError for a decoder that is split."""
        if self._team:
            raise ToolkitError(
                "the layers of a decoder split over several devices cannot be watched; use one device"
            )
        self.decoder.tap = tap
        return self.decoder.stages()

    def layers(self) -> list:
        """The decoder's layers (models.network.decoder.Layer); what is put into the list is what
        runs."""
        return self.decoder.layers

    def follow(self, work: dict):
        """On ranks other than 0: this device's part of what rank 0 computes."""
        self._runner.follow(work)

    # inside

    @contextmanager
    def _sequence(self, prompt, new_tokens):
        """A sequence beside the scheduler's; ToolkitError when requests that are under way left no
        room for it."""
        tokens = len(prompt.ids) + new_tokens
        if self._cache.blocks_for(tokens) > self._cache.free_blocks:
            raise ToolkitError(
                f"{tokens} tokens do not fit beside the requests that are under way; finish or cancel them, "
                "or raise --max-num-seqs"
            )
        sequence = Sequence(prompt, self._cache.allocate(tokens))
        try:
            yield sequence
        finally:
            self._cache.release(sequence.block_table)

    def _request(self, prompt, params) -> Request:
        params = params or SamplingParams()
        return Request(self.family, prompt, params, self.settings(prompt, params))

    def _run(self, requests):
        """Step until all are finished, and yield in between; others make progress too. Raises what
        ended one."""
        for request in requests:
            self._scheduler.add(request)
        try:
            while True:
                for request in requests:
                    if request.error:
                        raise request.error
                finished = all(request.finished for request in requests)
                yield
                if finished:
                    return
                self._scheduler.step()
        finally:
            for request in requests:
                self._scheduler.cancel(request)
