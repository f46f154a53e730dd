"""The routes: OpenAI's, vLLM's small helpers beside them, and the VisualGLM guide's `POST /`.

Takes the Service, returns the ASGI application.
"""

import time
from functools import partial

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from models.errors import UserError
from runtime.common.machine import version
from runtime.serve.transport.bodies import describe_bodies, json_body, openapi_of
from runtime.serve.transport.guard import Guard

from .errors import ApiError, as_api_error, error_response
from .responses import ChatResponses, model_card
from .schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LegacyRequest,
    TokenizeRequest,
)
from .service import Service

BODIES = [ChatRequest, CompletionRequest, LegacyRequest, TokenizeRequest, DetokenizeRequest]
PLACES = "chats go to POST /v1/chat/completions, texts to POST /v1/completions"
VERSION = version("ascend-vlm") or "unknown"


def create_app(
    service: Service,
    max_body: int,
    max_in_flight: int,
    api_key: str | None,
    allowed_origins: tuple[str, ...] = (),
) -> FastAPI:
    """allowed_origins: of pages that browsers let use the service."""
    app = FastAPI(title="ascend-vlm", version=VERSION, docs_url=None, redoc_url=None)
    app.add_middleware(
        Guard,
        check=service.check_ready,
        max_in_flight=max_in_flight,
        max_body=max_body,
        api_key=api_key,
    )
    if allowed_origins:  # outside the guard: a browser asks first, without the key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
        )
    for kind in (ApiError, UserError, HTTPException, Exception):
        app.add_exception_handler(kind, respond_to_error)
    add_completions(app, service)
    add_legacy(app, service)
    add_tokenizer(app, service)
    add_status(app, service)
    describe_bodies(app, BODIES)
    return app


async def respond_to_error(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException) and error.status_code in (404, 405):
        asked = f"{request.method} {request.url.path[:100]}"
        error = ApiError(f"this server has no {asked}; {PLACES}", error.status_code)
    return error_response(as_api_error(error))


def add_completions(app: FastAPI, service: Service):
    @app.post("/v1/chat/completions", openapi_extra=openapi_of(ChatRequest))
    async def chat(request: json_body(ChatRequest)):
        tools = request.offered_tools
        forced = request.forced_tool
        prompt = partial(service.prompts.chat, request.messages, tools=tools, forced=forced)
        return await service.complete(request, prompt, lambda _: service.chat_responses(request))

    @app.post("/v1/completions", openapi_extra=openapi_of(CompletionRequest))
    async def complete(request: json_body(CompletionRequest)):
        prompt = partial(service.prompts.completion, request)
        responses = partial(service.completion_responses, request)
        return await service.complete(request, prompt, responses)


def add_legacy(app: FastAPI, service: Service):
    @app.post("/", openapi_extra=openapi_of(LegacyRequest))
    async def legacy(request: json_body(LegacyRequest)):
        prompt = await service.run_in_pool(service.prompts.legacy, request)
        max_tokens = request.max_new_tokens(len(prompt.ids))
        service.prompts.check_length(len(prompt.ids), max_tokens)
        params = request.sampling(max_tokens)
        body = await service.whole(prompt, params, ChatResponses(service.names[0]))
        text = body["choices"][0]["message"]["content"]
        return {
            "result": text,
            "history": [*request.history, (request.text, text)],
            "status": 200,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }


def add_tokenizer(app: FastAPI, service: Service):
    @app.post("/tokenize", openapi_extra=openapi_of(TokenizeRequest))
    async def tokenize(request: json_body(TokenizeRequest)):
        service.check_model(request.model)
        request.check()
        prompts = service.prompts
        if request.messages is None:
            build = partial(prompts.token_ids, request.prompt, request.add_special_tokens)
            ids = await service.run_in_pool(build)
        else:
            build = partial(prompts.chat, request.messages, tools=request.offered_tools)
            prompt = await service.run_in_pool(build)
            ids = prompt.ids.tolist()
        return {"count": len(ids), "max_model_len": service.engine.max_model_len, "tokens": ids}

    @app.post("/detokenize", openapi_extra=openapi_of(DetokenizeRequest))
    async def detokenize(request: json_body(DetokenizeRequest)):
        service.check_model(request.model)
        return {"prompt": await service.run_in_pool(service.prompts.text_of, request.tokens)}


def add_status(app: FastAPI, service: Service):
    def card(name: str) -> dict:
        return model_card(name, service.engine.max_model_len, service.started)

    @app.get("/v1/models")
    async def models():
        service.check_ready()
        return {"object": "list", "data": [card(name) for name in service.names]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        service.check_ready()
        service.check_model(name)
        return card(name)

    @app.get("/health")
    async def health():
        service.check_ready()
        return Response()

    @app.get("/version")
    async def version():
        return {"version": VERSION}

    @app.get("/metrics")
    async def metrics():
        return Response(service.telemetry.text(service.engine), media_type=CONTENT_TYPE_LATEST)
