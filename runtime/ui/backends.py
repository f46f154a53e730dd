"""What answers the page: an engine of this process, or a server.

Takes chat messages with paths of images, yields the answer in pieces.
"""

import base64
import mimetypes
import os
import signal
from pathlib import Path

import openai

from runtime.common.errors import ToolkitError
from runtime.common.progress import print_status
from runtime.engine.command import open_engine
from runtime.engine.options import EngineOptions, SamplingParams, one_at_a_time
from runtime.serve.engine_thread import EngineThread
from runtime.serve.images import ImageRules
from runtime.serve.prompts import takes_system

from .options import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, UiOptions

DEFAULT_MAX_MODEL_LEN = 4096  # of a server that does not name its model's
CONNECT_SECONDS = 10


class Local:
    """An engine of this process, with a cache for one question at a time; with --max-num-seqs the
    questions of several visitors are decoded together, as in the service."""

    def __init__(self, options: UiOptions, engine_options: EngineOptions):
        self.engine = open_engine(options.model, one_at_a_time(engine_options))
        family = self.engine.family
        self.name = family.name
        self.max_model_len = self.engine.max_model_len
        self.takes_images = family.vision is not None
        self.takes_system = takes_system(family)
        self.released_sampling = family.sampling(self.takes_images)
        self._language = options.language
        self._rules = ImageRules(0, MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS)
        self._engine_thread = EngineThread(lambda: self.engine, end_process, lambda stream: None)

    def __enter__(self):
        print_status("\n".join(self.engine.describe()))
        self._engine_thread.start()
        return self

    def __exit__(self, *error):
        self._engine_thread.stop()
        if self._engine_thread.failure:
            raise self._engine_thread.failure

    async def stream(self, messages: list[dict], sampling: SamplingParams):
        """Yields the answer in pieces. messages: of Engine.prompt, with paths of images."""
        prompt = await self._engine_thread.run_in_pool(self._prompt, messages)
        async with self._engine_thread.submit(prompt, sampling) as answer:
            async for piece in answer:
                yield piece.text

    def _prompt(self, messages: list[dict]):
        return self.engine.prompt(replace_images(messages, self._decoded), language=self._language)

    def _decoded(self, path: str) -> dict:
        return {"type": "image", "image": self._rules.decode(Path(path).read_bytes())}


def end_process():
    os.kill(os.getpid(), signal.SIGTERM)


class Remote:
    """A server with OpenAI's API. It does not tell with which sampling its model was released."""

    takes_images = True
    takes_system = True
    released_sampling = None

    def __init__(self, options: UiOptions):
        url = options.server.rstrip("/").removesuffix("/v1") + "/v1"
        known = {"base_url": url, "api_key": options.api_key or "none", "max_retries": 0}
        try:
            models = openai.OpenAI(**known, timeout=CONNECT_SECONDS).models.list()
            card = models.data[0]
        except (openai.OpenAIError, IndexError, AttributeError) as error:
            raise ToolkitError(
                f"--server {options.server} does not list a model: {user_message(error)}; is the "
                "URL that of an OpenAI-compatible server, and --api-key its key?"
            ) from None
        self.name = card.id
        self.max_model_len = getattr(card, "max_model_len", None) or DEFAULT_MAX_MODEL_LEN
        self._client = openai.AsyncOpenAI(**known)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    async def stream(self, messages: list[dict], sampling: SamplingParams):
        """Yields the answer in pieces, as Local.stream."""
        answer = await self._client.chat.completions.create(
            model=self.name,
            messages=replace_images(messages, as_data_uri),
            stream=True,
            extra_body=given_fields(sampling, "top_k", "repetition_penalty"),
            **given_fields(sampling, "temperature", "top_p", "max_tokens"),
        )
        async with answer:
            async for chunk in answer:
                if chunk.choices:
                    yield chunk.choices[0].delta.content or ""


def given_fields(sampling: SamplingParams, *names) -> dict:
    values = {name: getattr(sampling, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def replace_images(messages: list[dict], as_part) -> list[dict]:
    """The messages with as_part(path) in place of every image part."""
    replaced = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            content = [as_part(p["image"]) if p["type"] == "image" else p for p in content]
        replaced.append({**message, "content": content})
    return replaced


def as_data_uri(path: str) -> dict:
    kind = mimetypes.guess_type(path)[0] or "image/png"
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


def user_message(error: Exception) -> str:
    """One sentence for the visitor; of a server's error only its message."""
    body = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    return message or str(error)
