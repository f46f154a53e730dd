"""A prompt on its way to an answer: sampling state, text so far, blocks in the cache, what it cost."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch

from .answer import AnswerText
from .sampler import sample
from .sequence import Sequence


@dataclass
class Result:
    """finish_reason: "stop" (stop token or string), "length", "cancelled" or "error". metrics: seconds and token counts;
    cached_tokens of the prompt were already in the cache. logprobs, where asked for: per token {id: log probability} of
    the most likely ones and of the token itself, before temperature and penalties."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    metrics: dict = field(default_factory=dict)
    logprobs: list[dict[int, float]] = field(default_factory=list)


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


class Request:
    """`error` is what ended it when finish_reason is "error"."""

    def __init__(self, family, prompt, params, settings: Settings):
        self.prompt = prompt
        self.params = params
        self.settings = settings
        self.error = None
        self._stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else family.stop_ids)}
        self.answer = AnswerText(family, params.stop)
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
        self._keys = []
        self._pictures = [hashlib.sha256(pixels.tobytes()).digest() for pixels in prompt.pixels]
        self._generator = torch.Generator()
        self._generator.seed() if params.seed is None else self._generator.manual_seed(params.seed)

    @property
    def finished(self) -> bool:
        return bool(self.result.finish_reason)

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.sequence.known - self.sequence.length

    def spend(self, seconds: float):
        """Time of a step that it took part in."""
        self.result.metrics["decode_seconds" if self.sequence.token_ids else "prefill_seconds"] += (
            seconds
        )

    def take(self, logits) -> str:
        """Sample the next token from logits [vocab]; returns the new text. Finishes when it is the last."""
        seen = torch.from_numpy(self.sequence.ids(0, self.sequence.known))
        try:
            token = sample(
                logits, seen, seen[len(self.prompt.ids) :], self.settings, self._generator
            )
        except Exception as error:  # whatever it is, it is this request's alone
            return self.fail(error)
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
        return self.finish("error")

    def finish(self, reason: str) -> str:
        """Returns the text held back so far."""
        piece = self.answer.finish()
        self.result.finish_reason = reason
        self.result.text = self.answer.text
        return piece

    def keys(self, blocks: int, block_size: int) -> list[bytes]:
        """Keys of its first full `blocks`: digests of all tokens up to their end, with positions and pictures."""
        for i in range(len(self._keys), blocks):
            a = i * block_size
            b = (i + 1) * block_size
            digest = hashlib.sha256(self._keys[-1] if self._keys else b"")
            digest.update(
                self.sequence.ids(a, b).tobytes()
                + np.asarray(self.sequence.positions(a, b), np.int64).tobytes()
            )
            for first, picture in zip(self.prompt.layout.image_starts, self._pictures):
                if first < b:
                    digest.update(picture + int(first).to_bytes(8, "little"))
            self._keys.append(digest.digest())
        return self._keys[:blocks]

    def _append(self, token: int, logits):
        self.sequence.token_ids.append(token)
        self.result.metrics["output_tokens"] += 1
        if self.params.logprobs is not None:
            known = torch.log_softmax(logits, -1)
            likely = known.topk(min(self.params.logprobs, len(known))).indices.tolist()
            self.result.logprobs.append({i: float(known[i]) for i in [*likely, token]})
