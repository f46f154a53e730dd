"""Who answers the page: an engine of this process, or a server."""

import asyncio
import base64
import mimetypes
import os
import signal
import sys
from pathlib import Path

from runtime.common.errors import ToolkitError
from runtime.engine.command import open_engine
from runtime.engine.options import EngineOptions, SamplingParams

from .options import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, UiOptions


class Local:
    """An engine of this process; the questions of several visitors are decoded together, as in the service."""

    def __init__(self, options: UiOptions, engine_options: EngineOptions):
        from runtime.serve.engine_thread import EngineThread

        self.engine = open_engine(options.model, engine_options)
        family = self.engine.family
        self.name = family.name
        self.longest = self.engine.max_model_len
        self._language = options.language
        self.pictures = family.vision is not None
        self.system = takes_system(family)
        self.released = family.sampling(self.pictures)
        self._engine_thread = EngineThread(
            lambda: self.engine, lambda: os.kill(os.getpid(), signal.SIGTERM), lambda answer: None
        )

    def __enter__(self):
        print("\n".join(self.engine.describe()), file=sys.stderr)
        self._engine_thread.start()
        return self

    def __exit__(self, *error):
        self._engine_thread.stop()
        if self._engine_thread.failure:
            raise self._engine_thread.failure

    async def stream(self, messages: list[dict], sampling: SamplingParams):
        """Yields the answer in pieces; messages are as Engine.prompt takes them, with paths of pictures."""
        prompt = await asyncio.get_running_loop().run_in_executor(
            self._engine_thread.prompt_pool, self._prompt, messages
        )
        async with self._engine_thread.submit(prompt, sampling) as answer:
            async for piece in answer:
                yield piece.text

    def _prompt(self, messages):
        from runtime.serve.images import ImageRules

        rules = ImageRules(max_images=0, max_bytes=MAX_IMAGE_BYTES, max_pixels=MAX_IMAGE_PIXELS)
        return self.engine.prompt(
            with_pictures(
                messages,
                lambda path: {"type": "image", "image": rules.decode(Path(path).read_bytes())},
            ),
            language=self._language,
        )


class Remote:
    """A server with OpenAI's API. Which sampling its model was released with, it does not tell."""

    pictures = system = True
    released = None

    def __init__(self, options: UiOptions):
        import openai

        url = options.server.rstrip("/").removesuffix("/v1") + "/v1"
        known = {"base_url": url, "api_key": options.api_key or "none", "max_retries": 0}
        try:
            card = openai.OpenAI(**known, timeout=10).models.list().data[0]
        except (openai.OpenAIError, IndexError, AttributeError) as error:
            raise ToolkitError(
                f"--server {options.server} does not list a model: {said(error)}; is the URL that of an OpenAI-"
                "compatible server, and --api-key its key?"
            ) from None
        self.name = card.id
        self.longest = getattr(card, "max_model_len", None) or 4096
        self._client = openai.AsyncOpenAI(**known)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    async def stream(self, messages: list[dict], sampling: SamplingParams):
        """Yields the answer in pieces, as Local.stream."""
        from openai import omit

        given = {
            name: omit if value is None else value
            for name, value in vars(sampling).items()
            if name in ("temperature", "top_p", "max_tokens")
        }
        more = {
            name: getattr(sampling, name)
            for name in ("top_k", "repetition_penalty")
            if getattr(sampling, name) is not None
        }
        answer = await self._client.chat.completions.create(
            model=self.name,
            messages=with_pictures(messages, as_data_uri),
            stream=True,
            extra_body=more,
            **given,
        )
        async with answer:
            async for chunk in answer:
                if chunk.choices:
                    yield chunk.choices[0].delta.content or ""


def takes_system(family) -> bool:
    """Do this family's prompts have a place for a system message?"""
    from models.errors import ModelError

    try:
        family.prompt(
            [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}],
            family.languages[0],
        )
    except ModelError:
        return False
    return True


def with_pictures(messages: list[dict], part) -> list[dict]:
    """The messages with part(path) in place of every picture."""
    return [
        message
        if isinstance(message["content"], str)
        else {
            **message,
            "content": [
                part(p["image"]) if p["type"] == "image" else p for p in message["content"]
            ],
        }
        for message in messages
    ]


def as_data_uri(path: str) -> dict:
    kind = mimetypes.guess_type(path)[0] or "image/png"
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


def said(error: Exception) -> str:
    """One sentence for the visitor; of a server's error only its message."""
    body = getattr(error, "body", None)
    return (isinstance(body, dict) and body.get("message")) or str(error)
