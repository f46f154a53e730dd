"""A prompt on its way to an answer: its sequence in the cache, sampling state, text so far, what it
cost."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch

from .answer import AnswerText
from .sampler import sample
from .sequence import Sequence


@dataclass
class Result:
    """The answer, while it grows and afterwards.

    finish_reason: "" until it is finished, then "stop" (stop token or string), "length",
    "cancelled" or "error". metrics: seconds and token counts; cached_tokens of the prompt were
    already in the cache. logprobs, where asked for: per token {id: log probability} of the most
    likely ones and of the token itself, before temperature and penalties.
    """

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
        self._block_keys = []
        self._generator = torch.Generator()
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    @property
    def finished(self) -> bool:
        return bool(self.result.finish_reason)

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
            logprobs = torch.log_softmax(logits, -1)
            count = min(self.params.logprobs, len(logprobs))
            likely = logprobs.topk(count).indices.tolist()
            self.result.logprobs.append({i: float(logprobs[i]) for i in [*likely, token]})
