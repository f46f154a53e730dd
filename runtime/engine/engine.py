"""Engine: one model, loaded once; prompts in, answers (or features, or logits) out. The public Python API."""

import hashlib
import sys
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import replace

import numpy as np

from models import family_of
from models.family import Prompt
from runtime.common.errors import ToolkitError

from .options import EngineOptions, SamplingParams
from .request import Request, Result, Settings

FEATURES_KEPT = 16  # pictures whose features are remembered


class Engine:
    """Engine(model_dir, **fields of options.EngineOptions). Loading reads the decoder; the vision session opens with the
    first picture. Raises ToolkitError or ModelError, each one sentence, before memory is touched where that is possible.
    """

    def __init__(self, model_dir, **options):
        from models.checkpoint.quantized import check_stored, find_description, stored_weights
        from models.checkpoint.reader import Checkpoint
        from runtime.engine.loading.cpu_weights import check_packable
        from runtime.engine.loading.memory import SEQUENCES, longest_of
        from runtime.ops import choose
        from runtime.parallel.split import Split, check_split
        from runtime.parallel.team import open_team

        from .scheduler import Scheduler

        self.options = EngineOptions(**options)
        self.family = family_of(model_dir)
        check_split(self.family, self.options.tensor_parallel_size)
        check_packable(self.family, self.options.cpu_weights)
        self.max_model_len = longest_of(self.family, self.options.max_model_len)
        self._ops = choose(self.options.ops, self.options.device)
        self._block_size = self.options.block_size or self._ops.default_block_size
        dtype = (
            self._ops.default_dtype(self.family)
            if self.options.dtype == "auto"
            else self.options.dtype
        )
        self._ops.check(dtype, self._block_size)
        self.plan = self._plan(dtype)
        print(self.plan.describe(), file=sys.stderr)
        self.checkpoint = Checkpoint(self.family.directory)
        self.checkpoint.check(stored_weights(self.family))
        if description := find_description(self.family.directory):
            check_stored(description, self.checkpoint)
        if self.options.vision == "om" and self.family.vision:
            from runtime.vision.om_file import check_om

            check_om(
                self.family, self.checkpoint, self.options.artifact
            )  # before the weights are read
        self._vision = None
        self._features = OrderedDict()
        self.last_result = None
        self._team = self._ops.team = open_team(
            model_dir,
            replace(self.options, cache_tokens=self.plan.cache_tokens),
            load=Engine.from_options,
        )
        self._split = Split(
            self.family.decoder,
            self.options.tensor_parallel_size,
            self._team.rank if self._team else 0,
        )
        try:
            self._runner = self._load()
            self._scheduler = Scheduler(
                self._runner,
                self._look_at,
                self.options.max_num_seqs or SEQUENCES,
                self.options.max_num_batched_tokens,
            )
            if self._team:
                self._team.wait_for_all()
        except BaseException:
            self.close()
            raise

    @classmethod
    def from_options(cls, model_dir, options: EngineOptions) -> "Engine":
        return cls(model_dir, **vars(options))

    # prompts

    def prompt(
        self, messages, language: str | None = None, tools: list[dict] | None = None
    ) -> Prompt:
        """Chat messages -> Prompt. content: text, or parts {"type": "image", "image": path | PIL} and {"type": "text", ...}.

        tools: functions the model may call, as OpenAI describes them.
        """
        if language not in (None, *self.family.languages):
            raise ToolkitError(
                f"{self.family.name} has no prompt wording for language {language!r}; "
                f"use one of {', '.join(self.family.languages)}"
            )
        return self.family.prompt(messages, language or self.family.languages[0], tools)

    def prompt_from_ids(self, ids, pixels=None, image_starts=None) -> Prompt:
        """Already tokenised: ids as the original implementation feeds its model, pixels as its preprocessor returns them."""
        prompt = self.family.prompt_from_ids(ids, pixels, image_starts)
        bad = prompt.ids[(prompt.ids < 0) | (prompt.ids >= self.family.decoder.vocab_size)]
        if len(bad):
            raise ToolkitError(
                f"token id {bad[0]} is outside the vocabulary of {self.family.decoder.vocab_size}"
            )
        return prompt

    def check_length(self, prompt: Prompt, max_tokens: int = 1):
        if len(prompt.ids) == 0:
            raise ToolkitError("the prompt is empty; give --prompt some text")
        if len(prompt.ids) + max_tokens > self.max_model_len:
            raise ToolkitError(
                f"prompt of {len(prompt.ids)} tokens + {max_tokens} new tokens exceed the maximum length "
                f"{self.max_model_len}; shorten the prompt or lower --max-tokens"
            )

    def settings(self, prompt: Prompt, params: SamplingParams) -> Settings:
        defaults = self.family.sampling(bool(prompt.pixels))
        chosen = {
            name: getattr(defaults if getattr(params, name) is None else params, name)
            for name in ("temperature", "top_p", "top_k", "repetition_penalty")
        }
        limit = min(defaults.max_length, self.max_model_len)
        room = (limit if len(prompt.ids) < limit else self.max_model_len) - len(prompt.ids)
        max_tokens = max(room, 1) if params.max_tokens is None else params.max_tokens
        self.check_length(prompt, max_tokens)
        return Settings(
            min_p=params.min_p,
            presence_penalty=params.presence_penalty,
            frequency_penalty=params.frequency_penalty,
            max_tokens=max_tokens,
            **chosen,
        )

    # results

    def features(self, prompt: Prompt) -> np.ndarray:
        """float32 [pictures * rows, hidden], as spliced into the sequence."""
        if not prompt.pixels:
            return np.zeros((0, self.family.decoder.hidden), np.float32)
        return np.concatenate(self._rows(prompt))

    def prefill_logits(self, prompt: Prompt) -> np.ndarray:
        """float32 [T, vocab]: the logits of every prompt position."""
        self.check_length(prompt, 0)
        with self._sequence(prompt, 0) as sequence:
            return self._runner.prefill(sequence, self._rows(prompt), all_logits=True).numpy()

    def score(self, prompt: Prompt, token_ids) -> np.ndarray:
        """Teacher-forced decoding: float32 [n, vocab], row i predicts token_ids[i] after the prompt and token_ids[:i]."""
        token_ids = [int(t) for t in token_ids]
        self.check_length(prompt, len(token_ids))
        with self._sequence(prompt, len(token_ids)) as sequence:
            if self.options.layer_by_layer:
                return self._shelf.score(self._runner, sequence, self._rows(prompt), token_ids)
            rows = [self._runner.prefill(sequence, self._rows(prompt))]
            rows += [self._runner.decode([sequence], [token]) for token in token_ids[:-1]]
            return np.concatenate([row.numpy() for row in rows])

    def generate(
        self, prompts: list[Prompt], params: SamplingParams | list[SamplingParams] | None = None
    ) -> list[Result]:
        """Answers in the order of the prompts, decoded together; `params` for all, or one for each."""
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
        """One pass of the decoder over the requests that have room: (request, new text) of each that got a token or
        ended; a request that failed has finish_reason "error" and says why in `error`."""
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
        return len(self._scheduler.active), len(self._scheduler.waiting), used / (used + free)

    def describe(self) -> list[str]:
        """One line per stage: what runs where."""
        packed = (
            ""
            if self.options.cpu_weights == "float"
            else f", weights packed to {self.options.cpu_weights}"
        )
        lines = [
            f"model: {self.family.name} ({self.family.rule})",
            f"decoder: {self._ops.name} ops on {self._devices()}, {str(self.plan.dtype).split('.')[1]}{packed}"
            f"{self._ops.remark(self.plan.dtype)}",
        ]
        return lines + ([self._vision.describe()] if self._vision else [])

    def close(self):
        """Give the decoder's memory back, and end the processes it was split over. The engine is of no use afterwards."""
        from runtime.parallel.team import close_team

        self._runner = self._cache = self._scheduler = None
        if self._vision:
            self._vision.close()
        if self._team:
            close_team()

    def tap(self, tap=None) -> list[str]:
        """From now on `tap(stage, x)` sees the residual stream x [T, hidden] behind every stage of the decoder, and the next
        stage gets what it returns; None ends that. Returns the stages in order. ToolkitError for a decoder that is split."""
        if self._team:
            raise ToolkitError(
                "the layers of a decoder split over several devices cannot be watched; use one device"
            )
        self._runner.decoder.tap = tap
        return self._runner.decoder.stages()

    def layers(self) -> list:
        """The decoder's layers (models.network.decoder.Layer); what is put into the list is what runs."""
        return self._runner.decoder.layers

    def follow(self, *work):
        """On ranks other than 0: this device's part of what rank 0 computes."""
        self._runner.compute(*work)

    # inside

    def _devices(self) -> str:
        size = self.options.tensor_parallel_size
        return (
            self.options.device
            if size == 1
            else f"{self.options.device} and {size - 1} more (tensor parallel)"
        )

    def _plan(self, dtype: str):
        from runtime.engine.loading.memory import plan_engine
        from runtime.parallel.team import rank_and_size

        free = self._ops.free_memory()
        if self.options.device == "cpu":  # processes that split a decoder share the memory
            free //= self.options.tensor_parallel_size
        follows = (
            self.options.device == "cpu" and rank_and_size()[0] > 0
        )  # what rank 0 planned, it has checked
        return plan_engine(
            self.family, dtype, self.max_model_len, self.options, None if follows else free
        )

    def _load(self):
        from models.network.decoder import Decoder
        from runtime.engine.loading.weights import decoder_weights

        from .kv_cache import KVCache
        from .runner import Runner

        if self._team:
            self._team.connect(self.options.device)
        if self.options.layer_by_layer:
            from runtime.engine.loading.layer_by_layer import CurrentLayerWeights

            self._shelf = CurrentLayerWeights(
                self.checkpoint, self.family, self.plan.dtype, self._ops, self._split
            )
            weights = self._shelf.weights()
        elif self.options.cpu_weights == "float":
            weights = decoder_weights(
                self.checkpoint,
                self.family,
                self.plan.dtype,
                self.options.device,
                self._ops,
                self._split,
                self.options.keep_dtype,
            )
        else:
            from runtime.engine.loading.cpu_weights import packed_weights

            weights = packed_weights(
                self.checkpoint, self.family, self.plan.dtype, self.options.cpu_weights, self._split
            )
        decoder = Decoder(self._split.config, weights, self._ops)
        longest = -(-self.max_model_len // self._block_size)
        graphs = self._ops.records_graphs and not self.options.enforce_eager
        blocks = max(self.plan.cache_tokens // self._block_size, longest)
        self._cache = KVCache(
            decoder.config,
            blocks + graphs,
            self._block_size,
            self.plan.dtype,
            self.options.device,
            self._ops,
        )
        self._ops.loaded()
        return Runner(
            decoder, self._cache, self._graphs(decoder, longest) if graphs else None, self._team
        )

    def _graphs(self, decoder, longest):
        from .device_graphs import DecodeGraphs

        graphs = DecodeGraphs(decoder, self._cache, longest, self.options.device)
        graphs.record()
        return graphs

    @contextmanager
    def _sequence(self, prompt, new_tokens):
        """A sequence beside the scheduler's; ToolkitError when requests that are under way left no room for it."""
        from .sequence import Sequence

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
            self._cache.release(sequence.blocks)

    def _request(self, prompt, params) -> Request:
        params = params or SamplingParams()
        return Request(self.family, prompt, params, self.settings(prompt, params))

    def _rows(self, prompt) -> list[np.ndarray]:
        """[rows, hidden] per picture, computed once per picture: those not seen before in one call."""
        keys = [hashlib.sha256(pixels.tobytes()).digest() for pixels in prompt.pixels]
        fresh = {
            key: pixels for key, pixels in zip(keys, prompt.pixels) if key not in self._features
        }
        if fresh:
            self._features.update(
                zip(fresh, self._session().encode(np.concatenate(list(fresh.values()))))
            )
        rows = [self._features[key] for key in keys]
        while len(self._features) > FEATURES_KEPT:
            self._features.popitem(last=False)
        return rows

    def _look_at(self, prompt):
        """Rows of each picture, and the seconds that took; opening the session is not part of a picture's time."""
        self._session()
        start = time.perf_counter()
        return self._rows(prompt), time.perf_counter() - start

    def _session(self):
        if self._vision is None:
            from runtime.vision import open_session

            self._vision = open_session(
                self.options.vision,
                self.family,
                self.checkpoint,
                self.options.artifact,
                device=self.options.device,
                precision=self.options.vision_precision,
            )
        return self._vision

    def _run(self, requests):
        """Step until all are finished, and yield in between; others make progress too. Raises what ended one."""
        for request in requests:
            self._scheduler.add(request)
        try:
            while True:
                for failed in (r for r in requests if r.error):
                    raise failed.error
                finished = all(request.finished for request in requests)
                yield
                if finished:
                    return
                self._scheduler.step()
        finally:
            for request in requests:
                self._scheduler.cancel(request)
