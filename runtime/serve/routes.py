"""The routes: OpenAI's, vLLM's small helpers beside them, and the VisualGLM guide's `POST /`."""

import re
import time
from dataclasses import replace

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from models.errors import UserError
from runtime.common.machine import version

from .errors import ApiError, as_api_error
from .guard import Guard, as_response
from .responses import Form, model_card
from .schema import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ImagePart,
    LegacyRequest,
    Message,
    TextPart,
    TokenizeRequest,
)
from .service import Service
from .tool_calls import Reader

VERSION = version("ascend-vlm") or "unknown"
HAN = re.compile(r"[\u4e00-\u9fff]")


def create_app(service: Service, max_body: int, most: int, api_key: str | None) -> FastAPI:
    app = FastAPI(title="ascend-vlm", version=VERSION, docs_url=None, redoc_url=None)
    app.add_middleware(
        Guard, check=service.check_ready, most=most, max_body=max_body, api_key=api_key
    )
    add_errors(app)
    add_completions(app, service)
    add_helpers(app, service)
    return app


def add_completions(app: FastAPI, service: Service):
    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest):
        reader = Reader(service.engine.family, request.names, request.forced)
        return await service.answer(
            request,
            True,
            reader,
            service.chat_prompt,
            request.messages,
            None,
            request.offered,
            request.forced,
        )

    @app.post("/v1/completions")
    async def complete(request: CompletionRequest):
        return await service.answer(request, False, None, service.plain_prompt, request.prompt)

    @app.post("/")
    async def legacy(request: LegacyRequest):
        prompt = await service.prepare(legacy_prompt, service, request)
        room = request.max_length and request.max_length - len(prompt.ids)
        service.check_length(len(prompt.ids), room and max(room, 1))
        names = ("temperature", "top_p", "top_k", "repetition_penalty")
        params = replace(
            ChatRequest(messages=[Message(role="user", content="")]).sampling(),
            max_tokens=room and max(room, 1),
            **{name: getattr(request, name) for name in names},
        )
        done = await service.whole(
            prompt, params, Form(True, service.name, service.engine.family.tokenizer)
        )
        text = done["choices"][0]["message"]["content"]
        return {
            "result": text,
            "history": [*request.history, (request.text, text)],
            "status": 200,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
        }


def add_helpers(app: FastAPI, service: Service):
    @app.get("/v1/models")
    async def models():
        service.check_ready()
        return {
            "object": "list",
            "data": [model_card(service.name, service.engine.max_model_len, service.started)],
        }

    @app.get("/v1/models/{name:path}")
    async def model(name: str):
        service.check_ready()
        service.check_model(name)
        return model_card(service.name, service.engine.max_model_len, service.started)

    @app.post("/tokenize")
    async def tokenize(request: TokenizeRequest):
        if (request.prompt is None) == (request.messages is None):
            raise ApiError("give either prompt or messages", param="prompt")
        if request.messages is None:
            ids = await service.prepare(service.plain_ids, request.prompt)
        else:
            tools = [tool.told() for tool in request.tools or ()]
            ids = (
                await service.prepare(service.chat_prompt, request.messages, None, tools)
            ).ids.tolist()
        return {"count": len(ids), "max_model_len": service.engine.max_model_len, "tokens": ids}

    @app.post("/detokenize")
    async def detokenize(request: DetokenizeRequest):
        return {
            "prompt": await service.prepare(service.engine.family.tokenizer.decode, request.tokens)
        }

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


def add_errors(app: FastAPI):
    for kind in (
        ApiError,
        UserError,
        HTTPException,
        RequestValidationError,
        Exception,
    ):
        app.add_exception_handler(kind, answer_error)


async def answer_error(_, error: Exception) -> JSONResponse:
    return as_response(as_api_error(error))


def legacy_prompt(service: Service, request: LegacyRequest):
    """The guide's wording: Chinese or English after the question."""
    messages = [
        Message(role=role, content=text)
        for pair in request.history
        for role, text in zip(("user", "assistant"), pair)
    ]
    picture = (
        [ImagePart(type="image_url", image_url=f"data:image/any;base64,{request.image}")]
        if request.image
        else []
    )
    messages.append(
        Message(role="user", content=[*picture, TextPart(type="text", text=request.text)])
    )
    language = "zh" if HAN.search(request.text) else "en"
    return service.chat_prompt(
        messages, language if language in service.engine.family.languages else None
    )
