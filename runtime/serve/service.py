"""Answers requests: from a checked request to a response body."""

import asyncio
import json
import logging
import time
from contextlib import aclosing

from fastapi.responses import StreamingResponse

from .engine_thread import Worker
from .errors import ApiError, as_api_error
from .pictures import PictureRules
from .responses import Form
from .schema import Message
from .telemetry import Telemetry
from .tool_calls import Reader


class Service:
    """What the routes share. worker may still be loading its engine."""

    def __init__(
        self,
        worker: Worker,
        name: str,
        rules: PictureRules,
        telemetry: Telemetry,
        language: str | None = None,
    ):
        self.worker = worker
        self.name = name
        self.rules = rules
        self.telemetry = telemetry
        self.language = language
        self.started = int(time.time())

    @property
    def engine(self):
        return self.worker.engine

    def check_ready(self):
        if self.engine is None:
            raise ApiError("the model is still loading; try again later", 503, "loading")

    def check_model(self, name: str | None):
        if name not in (None, self.name):
            raise ApiError(
                f"the model {name[:100]!r} does not exist here; use {self.name!r}",
                404,
                "model_not_found",
                "model",
            )

    async def prepare(self, make, *args):
        """Run `make` in the few threads that read prompts and pictures."""
        return await asyncio.get_running_loop().run_in_executor(self.worker.pool, make, *args)

    def chat_prompt(
        self,
        messages: list[Message],
        language: str | None = None,
        tools=(),
        forced: str | None = None,
    ):
        """tools: descriptions of functions; forced: the one that the answer has to call."""
        self._check_tools(messages, tools)
        count = sum(m.pictures for m in messages)
        if count > self.rules.count:
            raise ApiError(
                f"{count} pictures in one request, the limit is {self.rules.count}",
                param="messages",
            )
        self._check_text(
            sum(len(text) for m in messages for text in m.texts)
            + len(json.dumps(tools, ensure_ascii=False))
        )
        spoken = [*map(self._spoken, messages)]
        spoken += [{"role": "assistant", "metadata": forced, "content": ""}] * bool(forced)
        return self.engine.prompt(spoken, language or self.language, [*tools] or None)

    def plain_prompt(self, prompt):
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], str):
            if len(prompt) > 1:
                raise ApiError(
                    "several prompts in one request are not supported; send one", param="prompt"
                )
            prompt = prompt[0]
        if isinstance(prompt, str):
            prompt = self.plain_ids(prompt)
        if not prompt:
            raise ApiError("the prompt is empty", param="prompt")
        self.check_length(len(prompt), None)
        return self.engine.prompt_from_ids(prompt)

    def plain_ids(self, text: str) -> list[int]:
        self._check_text(len(text))
        return self.engine.family.tokenizer.encode(text)

    def check_length(self, tokens: int, new: int | None):
        longest = self.engine.max_model_len
        if tokens + (new or 1) > longest:
            raise ApiError(
                f"the model's maximum context length is {longest} tokens; the prompt has {tokens} and "
                f"{new or 1} more were asked for",
                code="context_length_exceeded",
                param="messages",
            )

    def _check_text(self, characters: int):
        """No piece of any vocabulary is longer than this, so that tokenising it would be in vain."""
        if characters > 128 * self.engine.max_model_len:
            raise ApiError(
                f"{characters:,} characters exceed the model's maximum context length of "
                f"{self.engine.max_model_len} tokens",
                code="context_length_exceeded",
                param="messages",
            )

    def _check_tools(self, messages, tools):
        family = self.engine.family
        if not family.takes_tools and (
            tools or any(m.tool_calls or m.role == "tool" for m in messages)
        ):
            raise ApiError(
                f"tools are not supported: this server's model, {family.name}, knows none; leave out tools, "
                "tool_calls and tool messages",
                400,
                "unsupported_parameter",
                "tools",
            )

    def _spoken(self, message: Message) -> dict:
        calls = (
            {"tool_calls": [call.model_dump() for call in message.tool_calls]}
            if message.tool_calls
            else {}
        )
        return {"role": message.role, "content": self._content(message.content), **calls}

    def _content(self, content):
        if not isinstance(content, list):
            return content or ""
        return [
            {"type": "text", "text": part.text}
            if part.type == "text"
            else {"type": "image", "image": self.rules.from_url(part.url)}
            for part in content
        ]

    async def whole(self, prompt, params, form: Form) -> dict:
        async with self.worker.answer(prompt, params) as answer:
            async for _ in answer:
                pass
            return form.whole(answer.result)

    async def stream(self, prompt, params, form: Form, with_usage: bool):
        """Server-sent events. The first thing it yields comes when the engine has accepted the request."""
        async with self.worker.answer(prompt, params) as answer:
            try:
                yield "".join(map(event, form.first()))
                async for piece in answer:
                    for chunk in form.chunks(piece):
                        yield event(chunk)
                for chunk in form.last(answer.result):
                    yield event(chunk)
                if with_usage:
                    yield event(form.usage_chunk(answer.result.metrics))
            except Exception as error:
                told = as_api_error(error)
                if told.status == 500:
                    logging.getLogger("uvicorn.error").error(
                        "an answer ended by an error", exc_info=error
                    )
                yield event(told.body())
            yield "data: [DONE]\n\n"

    async def answer(self, request, chat: bool, reader: Reader | None, make, *source):
        """The whole of a completion request: check, read the prompt, answer at once or as a stream."""
        self.check_model(request.model)
        request.check()
        prompt = await self.prepare(make, *source)
        self.check_length(len(prompt.ids), request.longest)
        form = Form(chat, self.name, self.engine.family.tokenizer, reader)
        params = request.sampling()
        if not request.stream:
            return await self.whole(prompt, params, form)
        events = self.stream(
            prompt,
            params,
            form,
            bool(request.stream_options and request.stream_options.include_usage),
        )
        first = await anext(events)  # a request that is refused is refused with its status
        return StreamingResponse(
            continued(first, events),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )


def event(body: dict) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


async def continued(first, events):
    async with aclosing(events):
        yield first
        async for each in events:
            yield each
