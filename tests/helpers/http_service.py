"""The service in a thread of this process, listening on 127.0.0.1, and requests to it: for the tests of the service."""

import base64
import functools
import io
import threading
import time

import openai
import uvicorn
from PIL import Image
from service import HTTP, Client, free_port

import runtime.serve.routes  # noqa: F401  msmodelslim, once imported, gives pydantic another BaseModel: FastAPI comes before it
from runtime.common.flags import Parser
from runtime.engine.options import EngineOptions
from runtime.serve.__main__ import build
from runtime.serve.options import ServeOptions

FIXED = ["--vision", "torch", "--dtype", "float32"]


@functools.cache
def openai_client(url, api_key="any"):
    return openai.OpenAI(base_url=url, api_key=api_key, max_retries=0)


class Asking(Client):
    """A client of the service at `self.url`, with the requests that the tests need."""

    def post(self, path, body=None, **more):
        return HTTP.post(self.url + path, json=body, **more)

    def client(self, **more):
        return openai_client(self.url + "/v1", **more)

    def until(self, name, value, seconds=20):
        """Waits until the metric `name` has the value."""
        end = time.monotonic() + seconds
        while self.gauge(name) != value:
            assert time.monotonic() < end, f"{name} is {self.gauge(name)}, not {value}"
            time.sleep(0.02)


class Server(Asking):
    """The server that `python -m runtime.serve *argv` builds; `open_engine` replaces its engine."""

    def __init__(self, *argv, open_engine=None, wait=True):
        port = free_port()
        parser = Parser("serve", "", "", {"service": ServeOptions, "model": EngineOptions})
        options = parser.parse(["--port", str(port), *FIXED, *argv])
        self.url = f"http://127.0.0.1:{port}"
        self._server, self._engine_thread = build(uvicorn, *options)
        if open_engine:
            self._engine_thread.open_engine = open_engine
        self._engine_thread.start()
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)
        if wait:
            self.wait()

    def ended(self):
        return self._engine_thread.failure

    @property
    def engine(self):
        return self._engine_thread.engine

    def stop(self):
        self._server.should_exit = True
        self._thread.join(30)
        self._engine_thread.stop()


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png(width, height, colour=(200, 30, 60)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def about(url, text="描述图片"):
    """Messages: a question about the image at `url`."""
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def asked(text="hello", **more):
    """Body of a chat request with a greedy answer of 12 tokens; `more` replaces or adds fields."""
    return {
        "messages": [{"role": "user", "content": text}],
        "max_tokens": 12,
        "temperature": 0,
        "repetition_penalty": 1,
        "ignore_eos": True,
        **more,
    }
