"""Bodies of responses, whole and streamed, as OpenAI's API has them.

Takes results and pieces of an answer, returns dicts that become JSON.
"""

import time
import uuid
from typing import Any

from .tool_calls import ToolCallParser


class ResponseBuilder:
    """Bodies of one answer, of a `chat` or a plain completion, whole or in chunks."""

    def __init__(self, chat: bool, model: str, tokenizer, parser: ToolCallParser | None = None):
        self._chat = chat
        self._tokenizer = tokenizer
        self._parser = parser or ToolCallParser()
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, result) -> dict:
        """The body of an answer that is not streamed; result: of the engine."""
        choice = {"index": 0}
        if self._chat:
            kind = "chat.completion"
            choice["message"] = self._parser.message(result.text)
        else:
            kind = "text_completion"
            choice["text"] = result.text
        choice["logprobs"] = self._logprobs(result.token_ids, result.logprobs)
        choice["finish_reason"] = self._finish_reason(result)
        return {**self._head, "object": kind, "choices": [choice], "usage": usage(result.metrics)}

    def first_chunks(self) -> list[dict]:
        if not self._chat:
            return []
        return [self._chunk({"role": "assistant", "content": ""})]

    def chunks(self, piece) -> list[dict]:
        """An AnswerPiece -> chunks; its log probabilities go with the last."""
        deltas = self._parser.push(piece.text)
        logprobs = self._logprobs(piece.token_ids, piece.logprobs)
        if not deltas:
            return [self._chunk({}, logprobs)] if logprobs else []
        *others, last = deltas
        return [*map(self._chunk, others), self._chunk(last, logprobs)]

    def last_chunks(self, result) -> list[dict]:
        held_back = [self._chunk(delta) for delta in self._parser.finish()]
        return [*held_back, self._chunk({}, finish_reason=self._finish_reason(result))]

    def usage_chunk(self, metrics: dict) -> dict:
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": usage(metrics)}

    def _chunk(self, delta: dict, logprobs=None, finish_reason=None) -> dict:
        choice = {"index": 0}
        if self._chat:
            choice["delta"] = delta
        else:
            choice["text"] = delta.get("content", "")
        choice["logprobs"] = logprobs
        choice["finish_reason"] = finish_reason
        return {**self._head, "object": self._chunk_kind, "choices": [choice]}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _finish_reason(self, result) -> str:
        """A call that ran into max_tokens is not whole, so that stays "length"."""
        if self._parser.found_call and result.finish_reason == "stop":
            return "tool_calls"
        return result.finish_reason

    def _logprobs(self, token_ids: list[int], table: list[dict[int, float]]) -> dict | None:
        """table: per token {id: log probability}, as Result.logprobs has it; empty when not asked
        for."""
        if not table:
            return None
        rows = list(zip(token_ids, table))
        return self._chat_logprobs(rows) if self._chat else self._completion_logprobs(rows)

    def _chat_logprobs(self, rows: list[tuple[int, dict[int, float]]]) -> dict:
        entries = []
        for chosen, row in rows:
            top = [self._token(other, row[other]) for other in by_probability(row)]
            entries.append({**self._token(chosen, row[chosen]), "top_logprobs": top})
        return {"content": entries}

    def _completion_logprobs(self, rows: list[tuple[int, dict[int, float]]]) -> dict:
        found = {"tokens": [], "token_logprobs": [], "top_logprobs": []}
        for chosen, row in rows:
            top = {self._text(other): row[other] for other in by_probability(row)}
            found["tokens"].append(self._text(chosen))
            found["token_logprobs"].append(row[chosen])
            found["top_logprobs"].append(top)
        return found

    def _token(self, token_id: int, logprob: float) -> dict:
        text = self._text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, token_id: int) -> str:
        return self._tokenizer.decode([token_id])


def by_probability(row: dict[int, float]) -> list[int]:
    """The token ids of a row of Result.logprobs, the most likely first."""
    return sorted(row, key=row.get, reverse=True)


def usage(metrics: dict) -> dict:
    prompt_tokens = metrics["prompt_tokens"]
    output_tokens = metrics["output_tokens"]
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
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
