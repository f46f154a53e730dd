"""Computes the responses of the completion routes.

Takes checked requests, returns response bodies, or streams of server-sent events.
"""

import json
import logging
import time
from contextlib import aclosing

from fastapi.responses import StreamingResponse

from runtime.serve.tools.calls import ToolCallParser

from .engine_thread import AnswerStream, EngineThread
from .errors import ApiError, as_api_error
from .logprobs import TokenLogprobs
from .prompts import PromptBuilder
from .responses import ChatResponses, CompletionResponses, ResponseBuilder
from .schema import ChatRequest, CompletionRequest, SamplingRequest, StreamOptions
from .telemetry import Telemetry


class Service:
    """What the routes share. engine_thread may still be loading its engine; names: that clients use
    for the model; takes_any_name: others are taken for it, too."""

    def __init__(
        self,
        engine_thread: EngineThread,
        prompts: PromptBuilder,
        telemetry: Telemetry,
        names: tuple[str, ...],
        takes_any_name: bool = False,
    ):
        self.prompts = prompts
        self.telemetry = telemetry
        self.names = names
        self._takes_any_name = takes_any_name
        self.started = int(time.time())
        self._engine_thread = engine_thread

    @property
    def engine(self):
        """None while it loads."""
        return self._engine_thread.engine

    def check_ready(self):
        if self.engine is None:
            raise ApiError("the model is still loading; try again later", 503, "loading")

    def check_model(self, name: str | None):
        if not name or name in self.names or self._takes_any_name:
            return
        known = " or ".join(map(repr, self.names))
        raise ApiError(
            f"the model {name[:100]!r} does not exist here; use {known}",
            404,
            "model_not_found",
            "model",
        )

    def chat_responses(self, request: ChatRequest) -> ChatResponses:
        """Answers carry the name by which the client asked for the model."""
        parser = ToolCallParser(self.engine.family, request.tool_names, request.forced_tool)
        return ChatResponses(
            request.model or self.names[0], self._token_logprobs(request.num_logprobs), parser
        )

    def completion_responses(self, request: CompletionRequest, prompt) -> CompletionResponses:
        return CompletionResponses(
            request.model or self.names[0],
            self._token_logprobs(request.num_logprobs, continued=not request.echo),
            prompt,
            echo=request.echo,
            prompt_only=request.max_tokens == 0,
        )

    def _token_logprobs(self, count: int | None, continued: bool = False) -> TokenLogprobs | None:
        """count: of the likeliest tokens at each place; None: no log probabilities."""
        if count is None:
            return None
        return TokenLogprobs(self.engine.family.tokenizer, count, continued)

    async def run_in_pool(self, function, *arguments):
        return await self._engine_thread.run_in_pool(function, *arguments)

    async def complete(self, request: SamplingRequest, build_prompt, build_responses):
        """The response of a completion request: a dict, or the events of a stream.

        build_prompt() is called in the pool, after the request has been checked;
        build_responses(prompt) gives the ResponseBuilder.
        """
        self.check_model(request.model)
        request.check()
        prompt = await self.run_in_pool(build_prompt)
        self.prompts.check_length(len(prompt.ids), request.max_new_tokens, request.prompt_field)
        params = request.sampling()
        responses = build_responses(prompt)
        if not request.stream:
            return await self.whole(prompt, params, responses)
        events = self._events(prompt, params, responses, request.stream_options or StreamOptions())
        first = await anext(events)  # a request that is refused is refused with its status
        return StreamingResponse(
            chain(first, events),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )

    async def whole(self, prompt, params, responses: ResponseBuilder) -> dict:
        """The body of an answer that is not streamed."""
        async with self._engine_thread.submit(prompt, params) as stream:
            async for _ in stream:
                pass
            return responses.whole(stream.result)

    async def _events(self, prompt, params, responses: ResponseBuilder, options: StreamOptions):
        """Server-sent events. The first is yielded when the engine has accepted the request."""
        async with self._engine_thread.submit(prompt, params) as stream:
            add_usage = usage_adder(responses, stream, options)
            try:
                yield "".join(event(add_usage(chunk)) for chunk in responses.first_chunks())
                async for piece in stream:
                    for chunk in responses.chunks(piece):
                        yield event(add_usage(chunk))
                for chunk in responses.last_chunks(stream.result):
                    yield event(add_usage(chunk))
                if options.include_usage:
                    yield event(responses.usage_chunk(stream.result.metrics))
            except Exception as error:
                yield event(logged(error).body())
            yield "data: [DONE]\n\n"


def usage_adder(responses: ResponseBuilder, stream: AnswerStream, options: StreamOptions):
    """A function that puts into a chunk what OpenAI's and vLLM's stream_options ask for: null, for
    the counts that come at the end, or the counts so far."""

    def add(chunk: dict) -> dict:
        if not options.include_usage:
            return chunk
        counts = None
        if options.continuous_usage_stats:
            counts = responses.usage(stream.result.metrics)
        return {**chunk, "usage": counts}

    return add


def event(body: dict) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def logged(error: Exception) -> ApiError:
    """The error as clients see it; one that is the server's fault goes to its log."""
    api_error = as_api_error(error)
    if api_error.status == 500:
        log = logging.getLogger("uvicorn.error")
        log.error("an answer ended by an error", exc_info=error)
    return api_error


async def chain(first, events):
    """`first`, then the others; closes `events` with itself."""
    async with aclosing(events):
        yield first
        async for each in events:
            yield each
