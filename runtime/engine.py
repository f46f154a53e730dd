"""Engine: one model, loaded once; prompts in, answers (or features, or logits) out. The public Python API."""
import hashlib
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np

from models import family_of
from models.base import Prompt

from .answer import AnswerText
from .errors import ToolkitError
from .options import EngineOptions, SamplingParams

SEQUENCES = 8           # the cache holds this many sequences of full length
FEATURES_KEPT = 16      # pictures whose features are remembered


@dataclass
class Result:
    """finish_reason: "stop" (stop token or string) or "length". metrics: seconds and token counts."""
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    metrics: dict = field(default_factory=dict)


@dataclass
class Settings:
    """SamplingParams with every gap filled from the release's defaults."""
    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    max_tokens: int


class Request:
    """A prompt on its way: its sequence in the cache, sampling state and text so far."""

    def __init__(self, engine, prompt, params):
        import torch
        self.prompt, self.params, self.settings = prompt, params, engine.settings(prompt, params)
        self.answer, self.result, self.sequence = AnswerText(engine.family, params.stop), Result(), None
        self.generator = torch.Generator()
        self.generator.seed() if params.seed is None else self.generator.manual_seed(params.seed)

    def take(self, logits, stop_ids) -> str:
        """Sample the next token from logits [vocab]; returns the new text. Sets finish_reason when it is the last."""
        import torch

        from .sampler import sample
        seen = torch.from_numpy(np.concatenate((self.prompt.ids, self.sequence.token_ids)).astype(np.int64))
        token = sample(logits, seen, self.settings, self.generator)
        if token in stop_ids and not self.params.ignore_eos:
            return self._finish("stop")
        self.sequence.token_ids.append(token)
        piece = self.answer.push(token)
        if self.answer.stopped:
            return piece + self._finish("stop")
        if len(self.sequence.token_ids) == self.settings.max_tokens:
            return piece + self._finish("length")
        return piece

    def _finish(self, reason) -> str:
        piece = self.answer.finish()
        self.result.finish_reason, self.result.token_ids = reason, self.sequence.token_ids
        self.result.text = self.answer.text
        return piece


class Engine:
    """Engine(model_dir, **fields of options.EngineOptions). Loading reads the decoder; the vision session opens with the
    first picture. Raises ToolkitError or ModelError, each one sentence, before memory is touched where that is possible.
    """

    def __init__(self, model_dir, **options):
        from models.checkpoint import Checkpoint

        from .ops import choose
        from .parallel import open_team
        from .plan import longest_of
        from .split import Split, check_split
        self.options = EngineOptions(**options)
        self.family = family_of(model_dir)
        check_split(self.family, self.options.tensor_parallel_size)
        self.max_model_len = longest_of(self.family, self.options.max_model_len)
        self._ops = choose(self.options.ops, self.options.device)
        self._block_size = self.options.block_size or self._ops.default_block_size
        dtype = self._ops.default_dtype(self.family) if self.options.dtype == "auto" else self.options.dtype
        self._ops.check(dtype, self._block_size)
        self.plan = self._plan(dtype)
        print(self.plan.describe(), file=sys.stderr)
        self._check_memory()
        self.checkpoint = Checkpoint(self.family.directory)
        self.checkpoint.check(self.family.weights())
        if self.options.vision == "om" and self.family.vision:
            from .vision import check_om
            check_om(self.family, self.checkpoint, self.options.artifact)       # before the weights are read
        self._vision, self._features, self.last_result = None, OrderedDict(), None
        self._team = self._ops.team = open_team(model_dir, self.options)
        self._split = Split(self.family.decoder, self.options.tensor_parallel_size, self._team.rank if self._team else 0)
        try:
            self._runner = self._load()
            if self._team:
                self._team.wait_for_all()
        except BaseException:
            self.close()
            raise

    # prompts

    def prompt(self, messages, language: str | None = None, tools: list[dict] | None = None) -> Prompt:
        """Chat messages -> Prompt. content: text, or parts {"type": "image", "image": path | PIL} and {"type": "text", ...}.

        tools: functions the model may call, as OpenAI describes them.
        """
        if language not in (None, *self.family.languages):
            raise ToolkitError(f"{self.family.name} has no prompt wording for language {language!r}; "
                               f"use one of {', '.join(self.family.languages)}")
        return self.family.prompt(messages, language or self.family.languages[0], tools)

    def prompt_from_ids(self, ids, pixels=None, image_starts=None) -> Prompt:
        """Already tokenised: ids as the original implementation feeds its model, pixels as its preprocessor returns them."""
        prompt = self.family.prompt_from_ids(ids, pixels, image_starts)
        bad = prompt.ids[(prompt.ids < 0) | (prompt.ids >= self.family.decoder.vocab_size)]
        if len(bad):
            raise ToolkitError(f"token id {bad[0]} is outside the vocabulary of {self.family.decoder.vocab_size}")
        return prompt

    def check_length(self, prompt: Prompt, max_tokens: int = 1):
        if len(prompt.ids) == 0:
            raise ToolkitError("the prompt is empty; give --prompt some text")
        if len(prompt.ids) + max_tokens > self.max_model_len:
            raise ToolkitError(f"prompt of {len(prompt.ids)} tokens + {max_tokens} new tokens exceed the maximum length "
                               f"{self.max_model_len}; shorten the prompt or lower --max-tokens")

    def settings(self, prompt: Prompt, params: SamplingParams) -> Settings:
        defaults = self.family.sampling(bool(prompt.pixels))
        chosen = {name: getattr(defaults if getattr(params, name) is None else params, name)
                  for name in ("temperature", "top_p", "top_k", "repetition_penalty")}
        limit = min(defaults.max_length, self.max_model_len)
        room = (limit if len(prompt.ids) < limit else self.max_model_len) - len(prompt.ids)
        max_tokens = max(room, 1) if params.max_tokens is None else params.max_tokens
        self.check_length(prompt, max_tokens)
        return Settings(max_tokens=max_tokens, **chosen)

    # results

    def features(self, prompt: Prompt) -> np.ndarray:
        """float32 [pictures * rows, hidden], as spliced into the sequence."""
        if not prompt.pixels:
            return np.zeros((0, self.family.decoder.hidden), np.float32)
        return np.concatenate(self._rows(prompt))

    def prefill_logits(self, prompt: Prompt) -> np.ndarray:
        """float32 [T, vocab]: the logits of every prompt position."""
        self.check_length(prompt, 0)
        sequence = self._sequence(prompt, 0)
        try:
            return self._runner.prefill(sequence, self._rows(prompt), all_logits=True).cpu().numpy()
        finally:
            self._cache.release(sequence.table)

    def score(self, prompt: Prompt, token_ids) -> np.ndarray:
        """Teacher-forced decoding: float32 [n, vocab], row i predicts token_ids[i] after the prompt and token_ids[:i]."""
        token_ids = [int(t) for t in token_ids]
        self.check_length(prompt, len(token_ids))
        sequence = self._sequence(prompt, len(token_ids))
        try:
            rows = [self._runner.prefill(sequence, self._rows(prompt))]
            rows += [self._runner.decode([sequence], [token]) for token in token_ids[:-1]]
            return np.concatenate([row.cpu().numpy() for row in rows])
        finally:
            self._cache.release(sequence.table)

    def generate(self, prompts: list[Prompt], params: SamplingParams | None = None) -> list[Result]:
        """Answers in the order of the prompts; they are decoded together as far as the cache has room."""
        requests = [Request(self, prompt, params or SamplingParams()) for prompt in prompts]
        for _ in self._run(requests):
            pass
        return [request.result for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None):
        """Yields the answer's text in pieces; afterwards `last_result` is the whole Result."""
        request = Request(self, prompt, params or SamplingParams())
        for _, piece in self._run([request]):
            if piece:
                yield piece
        self.last_result = request.result

    def describe(self) -> list[str]:
        """One line per stage: what runs where."""
        lines = [f"model: {self.family.name} ({self.family.rule})",
                 f"decoder: {self._ops.name} ops on {self._devices()}, {str(self.plan.dtype).split('.')[1]}"]
        return lines + ([self._vision.describe()] if self._vision else [])

    def close(self):
        """Give the decoder's memory back, and end the processes it was split over. The engine is of no use afterwards."""
        from .parallel import close_team
        self._runner = self._cache = None
        if self._vision:
            self._vision.close()
        if self._team:
            close_team()

    def tap(self, tap=None) -> list[str]:
        """From now on `tap(stage, x)` sees the residual stream x [T, hidden] behind every stage of the decoder, and the next
        stage gets what it returns; None ends that. Returns the stages in order. ToolkitError for a decoder that is split."""
        if self._team:
            raise ToolkitError("the layers of a decoder split over several devices cannot be watched; use one device")
        self._runner.decoder.tap = tap
        return self._runner.decoder.stages()

    def layers(self) -> list:
        """The decoder's layers (models.decoder.Layer); what is put into the list is what runs."""
        return self._runner.decoder.layers

    def follow(self, *work):
        """On ranks other than 0: this device's part of what rank 0 computes."""
        self._runner.compute(*work)

    # inside

    def _devices(self) -> str:
        size = self.options.tensor_parallel_size
        return self.options.device if size == 1 else f"{self.options.device} and {size - 1} more (tensor parallel)"

    def _plan(self, dtype: str):
        from .plan import make_plan, on_npu
        plan = make_plan(self.family, dtype, SEQUENCES * self.max_model_len, self.options.tensor_parallel_size)
        if self.options.device == "cpu":
            return plan
        return on_npu(plan, self.family, self.max_model_len, vision=self.options.vision in ("auto", "om"))

    def _check_memory(self):
        """The ranks of a decoder split over CPU processes share the memory that rank 0 looks at."""
        from .parallel import rank_and_size
        from .plan import check_memory
        if self.options.device != "cpu":
            check_memory(self.plan, self._ops.free_memory())
        elif not rank_and_size()[0]:
            check_memory(self.plan, self._ops.free_memory() // self.plan.devices)

    def _load(self):
        from models.decoder import Decoder

        from .cache import KVCache
        from .loading import decoder_weights
        from .runner import Runner
        if self._team:
            self._team.connect(self.options.device)
        weights = decoder_weights(self.checkpoint, self.family, self.plan.dtype, self.options.device, self._ops, self._split)
        decoder = Decoder(self._split.config, weights, self._ops)
        longest = -(-self.max_model_len // self._block_size)
        graphs = self._ops.records_graphs and not self.options.enforce_eager
        self._cache = KVCache(decoder.config, SEQUENCES * longest + graphs, self._block_size, self.plan.dtype,
                              self.options.device, self._ops)
        return Runner(decoder, self._cache, self._graphs(decoder, longest) if graphs else None, self._team)

    def _graphs(self, decoder, longest):
        from .graph import DecodeGraphs
        graphs = DecodeGraphs(decoder, self._cache, longest, self.options.device)
        graphs.record()
        return graphs

    def _sequence(self, prompt, new_tokens):
        from .runner import Sequence
        return Sequence(prompt, self._cache.allocate(len(prompt.ids) + new_tokens))

    def _rows(self, prompt) -> list[np.ndarray]:
        """[rows, hidden] per picture, computed once per picture: those not seen before in one call."""
        keys = [hashlib.sha256(pixels.tobytes()).digest() for pixels in prompt.pixels]
        fresh = {key: pixels for key, pixels in zip(keys, prompt.pixels) if key not in self._features}
        if fresh:
            self._features.update(zip(fresh, self._session().encode(np.concatenate(list(fresh.values())))))
        rows = [self._features[key] for key in keys]
        while len(self._features) > FEATURES_KEPT:
            self._features.popitem(last=False)
        return rows

    def _session(self):
        if self._vision is None:
            from .vision import open_session
            self._vision = open_session(self.options.vision, self.family, self.checkpoint, self.options.artifact,
                                        device=self.options.device)
        return self._vision

    def _run(self, requests):
        """Admit while the cache has room, decode all active requests together; yields (request, new text)."""
        waiting, active = list(requests)[::-1], []
        try:
            while waiting or active:
                while waiting and self._has_room(waiting[-1]):
                    active.append(waiting.pop())
                    yield active[-1], self._admit(active[-1])
                    active = self._retire(active)
                if active:
                    yield from self._decode(active)
                    active = self._retire(active)
        finally:
            for request in active:
                if request.sequence is not None:        # a picture that failed, or Ctrl-C before the prompt was run
                    self._cache.release(request.sequence.table)

    def _has_room(self, request) -> bool:
        tokens = len(request.prompt.ids) + request.settings.max_tokens
        return self._cache.blocks_for(tokens) <= self._cache.free_blocks

    def _admit(self, request) -> str:
        if request.prompt.pixels:
            self._session()             # opening it is not part of the picture's time
        start = time.perf_counter()
        rows = self._rows(request.prompt)
        encoded = time.perf_counter()
        request.sequence = self._sequence(request.prompt, request.settings.max_tokens)
        logits = self._runner.prefill(request.sequence, rows)
        request.result.metrics = {"prompt_tokens": len(request.prompt.ids), "vision_seconds": encoded - start,
                                  "prefill_seconds": time.perf_counter() - encoded, "decode_seconds": 0.0}
        return request.take(logits[0], self.family.stop_ids)

    def _decode(self, active):
        start = time.perf_counter()
        logits = self._runner.decode([r.sequence for r in active], [r.sequence.token_ids[-1] for r in active])
        pieces = [(r, r.take(row, self.family.stop_ids)) for r, row in zip(active, logits)]
        for request in active:
            request.result.metrics["decode_seconds"] += time.perf_counter() - start
            request.result.metrics["output_tokens"] = len(request.sequence.token_ids)
        yield from pieces

    def _retire(self, active):
        for request in (r for r in active if r.result.finish_reason):
            request.result.metrics["output_tokens"] = len(request.sequence.token_ids)
            self._cache.release(request.sequence.table)
        return [r for r in active if not r.result.finish_reason]
