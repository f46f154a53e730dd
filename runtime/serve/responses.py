"""Bodies of responses, whole and streamed, as OpenAI's API has them.

Takes results and pieces of an answer, returns dicts that become JSON.
"""

import time
import uuid
from typing import Any

from runtime.serve.tools.calls import ToolCallParser

from .logprobs import TokenLogprobs


class ResponseBuilder:
    """Bodies of one answer, of a `chat` or a plain completion, whole or in chunks."""

    def __init__(
        self,
        chat: bool,
        model: str,
        parser: ToolCallParser | None = None,
        token_logprobs: TokenLogprobs | None = None,
    ):
        self._chat = chat
        self._token_logprobs = token_logprobs
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
        if not table or self._token_logprobs is None:
            return None
        if self._chat:
            return self._token_logprobs.chat(token_ids, table)
        return self._token_logprobs.completion(token_ids, table)


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
