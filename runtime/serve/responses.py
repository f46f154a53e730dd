"""Bodies of answers, whole and streamed."""

import time
import uuid
from typing import Any

from .tool_calls import Reader


class Form:
    """Shapes of one answer: `chat` or plain completion, whole or in chunks. reader: of a chat's calls of functions."""

    def __init__(self, chat: bool, model: str, tokenizer, reader: Reader | None = None):
        self.chat = chat
        self.tokenizer = tokenizer
        self._reader = reader or Reader()
        self.head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, result) -> dict:
        text = (
            {"message": self._reader.message(result.text)} if self.chat else {"text": result.text}
        )
        choice = {
            "index": 0,
            **text,
            "logprobs": self.logprobs(result.token_ids, result.logprobs),
            "finish_reason": self._reason(result),
        }
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": [choice], "usage": usage(result.metrics)}

    def first(self) -> list[dict]:
        return [self._chunk({"role": "assistant", "content": ""})] if self.chat else []

    def chunks(self, piece) -> list[dict]:
        """A piece of the answer -> chunks; its log probabilities go with the last."""
        deltas = self._reader.push(piece.text)
        logprobs = self.logprobs(piece.token_ids, piece.logprobs)
        deltas = deltas or [{}] * bool(logprobs)
        return [self._chunk(delta, logprobs if delta is deltas[-1] else None) for delta in deltas]

    def last(self, result) -> list[dict]:
        return [
            *map(self._chunk, self._reader.finish()),
            self._chunk({}, finish_reason=self._reason(result)),
        ]

    def _chunk(self, delta: dict, logprobs=None, finish_reason=None) -> dict:
        choice = {
            "index": 0,
            **({"delta": delta} if self.chat else {"text": delta.get("content", "")}),
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return {**self.head, "object": self._chunk_kind, "choices": [choice]}

    def _reason(self, result) -> str:
        """A call that ran into max_tokens is not whole, so that stays "length"."""
        return (
            "tool_calls"
            if self._reader.called and result.finish_reason == "stop"
            else result.finish_reason
        )

    def usage_chunk(self, metrics: dict) -> dict:
        return {**self.head, "object": self._chunk_kind, "choices": [], "usage": usage(metrics)}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"

    def logprobs(self, token_ids, table: list[dict[int, float]]) -> dict | None:
        """table: per token {id: log probability}, as Result.logprobs has it; empty when not asked for."""
        if not table:
            return None
        rows = list(zip(token_ids, table))
        if self.chat:
            return {
                "content": [
                    {
                        **self._token(i, row[i]),
                        "top_logprobs": [self._token(j, row[j]) for j in _ranked(row)],
                    }
                    for i, row in rows
                ]
            }
        return {
            "tokens": [self._text(i) for i, _ in rows],
            "token_logprobs": [row[i] for i, row in rows],
            "top_logprobs": [{self._text(j): row[j] for j in _ranked(row)} for _, row in rows],
        }

    def _token(self, i: int, logprob: float) -> dict:
        return {"token": self._text(i), "logprob": logprob, "bytes": list(self._text(i).encode())}

    def _text(self, i: int) -> str:
        return self.tokenizer.decode([i])


def _ranked(row: dict[int, float]) -> list[int]:
    return sorted(row, key=row.get, reverse=True)


def usage(metrics: dict) -> dict:
    prompt = metrics["prompt_tokens"]
    answer = metrics["output_tokens"]
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": metrics["cached_tokens"]},
    }


def model_card(name: str, max_model_len: int, created: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "ascend-vlm",
        "max_model_len": max_model_len,
    }
