"""A prompt on its way to an answer: its sequence in the cache, sampling state, text so far, what it
cost."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch

from models.errors import UserError

from .answer import AnswerText
from .sampler import check_finite, sample
from .sequence import Sequence


@dataclass
class Result:
    """The answer, while it grows and afterwards.

    finish_reason: "" until it is finished, then "stop" (stop token or string), "length",
    "cancelled" or "error". metrics: seconds and token counts; cached_tokens of the prompt were
    already in the cache. logprobs, where asked for: per token {id: log probability} of the most
    likely ones and of the token itself, before temperature and penalties; prompt_logprobs: the same
    per token of the prompt, None for the first, which nothing precedes.
    """

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    metrics: dict = field(default_factory=dict)
    logprobs: list[dict[int, float]] = field(default_factory=list)
    prompt_logprobs: list[dict[int, float] | None] = field(default_factory=list)


@dataclass
class Settings:
    """SamplingParams with every gap filled from the release's defaults."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    max_tokens: int


CONTEXT = 8  # of the prompt's last tokens, which decide how a continued text begins


class Request:
    """`error` is what ended it when finish_reason is "error". features: of its images, until they
    are computed."""

    def __init__(self, family, prompt, params, settings: Settings):
        self.prompt = prompt
        self.params = params
        self.settings = settings
        self.error = None
        self._stop_ids = set(params.stop_token_ids)
        if not params.ignore_eos:
            self._stop_ids.update(family.stop_ids)
        continued = prompt.ids[-CONTEXT:].tolist() if params.continue_text else None
        self.answer = AnswerText(family, params.stop, continued)
        self.result = Result()
        self.sequence = Sequence(prompt, [])
        self.result.token_ids = self.sequence.token_ids
        self.result.metrics = {
            "prompt_tokens": len(prompt.ids),
            "cached_tokens": 0,
            "output_tokens": 0,
            "vision_seconds": 0.0,
            "prefill_seconds": 0.0,
            "decode_seconds": 0.0,
        }
        self.features = None
        self._block_keys = []
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    @property
    def finished(self) -> bool:
        return bool(self.result.finish_reason)

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether log probabilities of its prompt are asked for and not all there."""
        found = len(self.result.prompt_logprobs)
        return self.params.prompt_logprobs is not None and found < len(self.prompt.ids)

    def take_prompt_logits(self, start: int, logits):
        """logits float32 [n, vocab] of its tokens from `start` on: each predicts the next one. NaN
        or Inf ends the request."""
        try:
            check_finite(logits)
        except UserError as error:
            self.fail(error)
            return
        found = self.result.prompt_logprobs
        if not found:
            found.append(None)
        for place, row in enumerate(logits, start + 1):
            if place == len(found) < len(self.prompt.ids):  # not there from before a preemption
                token = int(self.prompt.ids[place])
                found.append(likeliest(row, self.params.prompt_logprobs, token))

    def add_seconds(self, seconds: float):
        """Count the time of a step that it took part in."""
        stage = "decode_seconds" if self.sequence.token_ids else "prefill_seconds"
        self.result.metrics[stage] += seconds

    def sample_next(self, logits) -> str:
        """Sample the next token from float32 logits [vocab]; returns the new text. Finishes when it
        is the last."""
        try:
            return self._sample_next(logits)
        except Exception as error:  # whatever it is, it is this request's alone
            return self.fail(error)

    def _sample_next(self, logits) -> str:
        seen = torch.from_numpy(self.sequence.ids(0, self.sequence.num_tokens))
        answer = seen[len(self.prompt.ids) :]
        token = sample(logits, seen, answer, self.settings, self._generator)
        if token in self._stop_ids:
            return self.finish("stop")
        self._append(token, logits)
        piece = self.answer.push(token)
        self.result.text = self.answer.text
        if self.answer.stopped:
            return piece + self.finish("stop")
        if len(self.sequence.token_ids) == self.settings.max_tokens:
            return piece + self.finish("length")
        return piece

    def fail(self, error: Exception) -> str:
        self.error = error
        try:
            return self.finish("error")
        except Exception:  # the tokenizer cannot show what was held back either
            self.result.finish_reason = "error"
            return ""

    def finish(self, reason: str) -> str:
        """Returns the text held back so far."""
        piece = self.answer.finish()
        self.result.finish_reason = reason
        self.result.text = self.answer.text
        return piece

    def block_keys(self, blocks: int, block_size: int) -> list[bytes]:
        """Keys of its first full `blocks`: digests of all tokens up to their end, with positions
        and images."""
        for block in range(len(self._block_keys), blocks):
            self._block_keys.append(self._block_key(block * block_size, (block + 1) * block_size))
        return self._block_keys[:blocks]

    def _block_key(self, start: int, end: int) -> bytes:
        """Key of the tokens [start, end), behind those that the last key stands for."""
        before = self._block_keys[-1] if self._block_keys else b""
        positions = np.asarray(self.sequence.positions(start, end), np.int64)
        digest = hashlib.sha256(before)
        digest.update(self.sequence.ids(start, end).tobytes() + positions.tobytes())
        for first, image in zip(self.prompt.layout.image_starts, self.prompt.image_digests):
            if first < end:
                digest.update(image + int(first).to_bytes(8, "little"))
        return digest.digest()

    def _append(self, token: int, logits):
        self.sequence.token_ids.append(token)
        self.result.metrics["output_tokens"] += 1
        if self.params.logprobs is not None:
            self.result.logprobs.append(likeliest(logits, self.params.logprobs, token))


def likeliest(logits, count: int, token: int) -> dict[int, float]:
    """{id: log probability} of the `count` most likely tokens and of `token`; logits float32
    [vocab]."""
    logprobs = torch.log_softmax(logits, -1)
    found = logprobs.topk(min(count, len(logprobs))).indices.tolist()
    return {i: float(logprobs[i]) for i in [*found, token]}
