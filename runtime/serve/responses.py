"""Bodies of responses, whole and streamed, as OpenAI's API has them.

Takes results and pieces of an answer, returns dicts that become JSON.
"""

import time
import uuid
from typing import Any

from runtime.serve.tools.calls import ToolCallParser

from .logprobs import TokenLogprobs


class ResponseBuilder:
    """Bodies of one answer, whole or in chunks. model: its name, as the client gave it.

    token_logprobs: for an answer whose log probabilities are asked for.
    """

    prefix = ""  # of the response's id
    whole_kind = ""
    chunk_kind = ""

    def __init__(self, model: str, token_logprobs: TokenLogprobs | None = None):
        self._token_logprobs = token_logprobs
        self._head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, result) -> dict:
        """The body of an answer that is not streamed; result: of the engine."""
        choice = {
            "index": 0,
            **self._content(result),
            "logprobs": self._logprobs(result.token_ids, result.logprobs, result.prompt_logprobs),
            "finish_reason": self._finish_reason(result),
        }
        head = {**self._head, "object": self.whole_kind}
        return {**head, "choices": [choice], "usage": self.usage(result.metrics)}

    def first_chunks(self) -> list[dict]:
        """What can be sent before the answer begins."""
        return []

    def chunks(self, piece) -> list[dict]:
        """An AnswerPiece -> chunks."""
        raise NotImplementedError

    def last_chunks(self, result) -> list[dict]:
        return [self._chunk({}, finish_reason=self._finish_reason(result))]

    def usage_chunk(self, metrics: dict) -> dict:
        head = {**self._head, "object": self.chunk_kind}
        return {**head, "choices": [], "usage": self.usage(metrics)}

    def usage(self, metrics: dict) -> dict:
        """metrics: of a Result, while it grows or afterwards."""
        prompt_tokens = metrics["prompt_tokens"]
        output_tokens = metrics["output_tokens"]
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": output_tokens,
            "total_tokens": prompt_tokens + output_tokens,
            "prompt_tokens_details": {"cached_tokens": metrics["cached_tokens"]},
        }

    def _content(self, result) -> dict:
        """What the choice of a whole answer says."""
        raise NotImplementedError

    def _delta(self, delta: dict) -> dict:
        """What the choice of a chunk says."""
        raise NotImplementedError

    def _logprobs(self, token_ids: list[int], rows: list[dict], prompt_rows: list) -> dict | None:
        """rows: per token {id: log probability}, as Result.logprobs has it; empty when not asked
        for. prompt_rows: the same of the prompt."""
        raise NotImplementedError

    def _finish_reason(self, result) -> str:
        return result.finish_reason

    def _chunk(self, delta: dict, logprobs=None, finish_reason=None) -> dict:
        choice = {
            "index": 0,
            **self._delta(delta),
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        return {**self._head, "object": self.chunk_kind, "choices": [choice]}


class ChatResponses(ResponseBuilder):
    """parser: finds the calls of functions in the answer."""

    prefix = "chatcmpl"
    whole_kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(
        self,
        model: str,
        token_logprobs: TokenLogprobs | None = None,
        parser: ToolCallParser | None = None,
    ):
        super().__init__(model, token_logprobs)
        self._parser = parser or ToolCallParser()

    def first_chunks(self) -> list[dict]:
        return [self._chunk({"role": "assistant", "content": ""})]

    def chunks(self, piece) -> list[dict]:
        """Log probabilities go with the last chunk of a piece."""
        deltas = self._parser.push(piece.text)
        logprobs = self._logprobs(piece.token_ids, piece.logprobs, [])
        if not deltas:
            return [self._chunk({}, logprobs)] if logprobs else []
        *others, last = deltas
        return [*map(self._chunk, others), self._chunk(last, logprobs)]

    def last_chunks(self, result) -> list[dict]:
        held_back = [self._chunk(delta) for delta in self._parser.finish()]
        return [*held_back, *super().last_chunks(result)]

    def _content(self, result) -> dict:
        return {"message": self._parser.message(result.text)}

    def _delta(self, delta: dict) -> dict:
        return {"delta": delta}

    def _logprobs(self, token_ids, rows, prompt_rows) -> dict | None:
        if not rows or self._token_logprobs is None:
            return None
        return self._token_logprobs.chat(token_ids, rows)

    def _finish_reason(self, result) -> str:
        """A call that ran into max_tokens is not whole, so that stays "length"."""
        if self._parser.found_call and result.finish_reason == "stop":
            return "tool_calls"
        return result.finish_reason


class CompletionResponses(ResponseBuilder):
    """prompt: of the engine, whose text and tokens stand in front of the answer with `echo`.
    prompt_only: the answer is left out."""

    prefix = "cmpl"
    whole_kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(
        self,
        model: str,
        token_logprobs: TokenLogprobs | None = None,
        prompt=None,
        echo: bool = False,
        prompt_only: bool = False,
    ):
        super().__init__(model, token_logprobs)
        self._echoed = prompt if echo else None  # what is yet to be sent of the prompt
        self._prompt_only = prompt_only

    def chunks(self, piece) -> list[dict]:
        text = self._text(piece.text)
        logprobs = self._logprobs(piece.token_ids, piece.logprobs, piece.prompt_logprobs)
        self._echoed = None
        if not text and not logprobs:
            return []
        return [self._chunk({"content": text}, logprobs)]

    def usage(self, metrics: dict) -> dict:
        if self._prompt_only:
            metrics = {**metrics, "output_tokens": 0}
        return super().usage(metrics)

    def _content(self, result) -> dict:
        return {"text": self._text(result.text)}

    def _delta(self, delta: dict) -> dict:
        return {"text": delta.get("content", "")}

    def _text(self, answer: str) -> str:
        text = self._echoed.text if self._echoed else ""
        return text if self._prompt_only else text + answer

    def _logprobs(self, token_ids, rows, prompt_rows) -> dict | None:
        if self._token_logprobs is None:
            return None
        if self._prompt_only:
            token_ids = []
            rows = []
        if self._echoed:
            token_ids = [*self._echoed.ids.tolist(), *token_ids]
            rows = [*prompt_rows, *rows]
        return self._token_logprobs.completion(token_ids, rows) if rows else None

    def _finish_reason(self, result) -> str:
        return "length" if self._prompt_only else result.finish_reason


def model_card(name: str, max_model_len: int, created: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "ascend-vlm",
        "max_model_len": max_model_len,
    }
