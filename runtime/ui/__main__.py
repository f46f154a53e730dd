"""`python -m runtime.ui`: a page to talk with a model about pictures, on an engine of its own or on a server's URL.

A question and the conversation so far flow in from the browser, the answer flows back piece by piece. The page asks nobody but
this process: no font, script, picture or statistics of another site, which a content policy makes the browser enforce.
"""
import asyncio
import base64
import mimetypes
import os
import signal
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path

from runtime.common.errors import MISSING_COMPONENT, ToolkitError, run_command
from runtime.common.flags import EngineOptions, Parser, SamplingParams, check_choices, check_folder, flag, require
from runtime.common.sample_questions import content
from runtime.serve.__main__ import KEY, LOCAL, ServeOptions

MAX_PICTURE, MAX_PIXELS = ServeOptions.max_image_bytes, ServeOptions.max_image_pixels       # what the service takes by default


@dataclass(kw_only=True)
class UiOptions:
    """Who answers, and where the page is shown."""
    model: str | None = flag("folder of a downloaded checkpoint", "-m", "--model-path", default=None, metavar="DIR")
    server: str | None = flag("instead of --model: URL of an OpenAI-compatible server, e.g. http://127.0.0.1:8000",
                              default=None, metavar="URL")
    api_key: str | None = flag(f"the server's key; {KEY} in the environment does the same without showing it to other "
                               "users of the machine", default=None, metavar="KEY")
    host: str = flag("address to listen on; 0.0.0.0 for the whole network", default="127.0.0.1", metavar="ADDRESS")
    port: int = flag("port to listen on", default=7860, kind=int, metavar="N")
    language: str | None = flag("wording of the prompt around the question (default: as released)", default=None,
                                choices=("zh", "en"))

    def __post_init__(self):
        check_choices(self)
        if bool(self.model) == bool(self.server):
            raise ToolkitError("give either --model DIR or --server URL")
        if self.model:
            check_folder("model", self.model)
        else:
            require(self, "server", self.server.startswith(("http://", "https://")), "use a URL such as http://127.0.0.1:8000")
            require(self, "language", self.language is None, "the server words the prompt; leave it out")
        require(self, "port", 0 < self.port < 65536, "use a port from 1 to 65535, e.g. 7860")
        self.api_key = self.api_key or os.environ.get(KEY)


def main(argv) -> int:
    options, engine_options, sampling = Parser(
        "python -m runtime.ui", "(--model DIR | --server URL) [options]",
        "A page in the browser: pictures, streamed answers, sampling; in English and Chinese, light and dark.",
        {"page": UiOptions, "model": EngineOptions, "where the page's sliders begin": SamplingParams}).parse(argv)
    if options.server and engine_options != EngineOptions():
        raise ToolkitError("--server runs its own engine; leave out the options of the model")
    os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1")     # both before gradio is imported
    with tempfile.TemporaryDirectory(prefix="ascend-vlm-ui-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder          # what visitors upload goes when the page goes
        try:
            import gradio  # noqa: F401
            import openai  # noqa: F401
        except ImportError as error:
            raise ToolkitError(f"the page needs {error.name}; run: pip install 'ascend-vlm[ui]'", MISSING_COMPONENT) from None
        if options.host not in LOCAL:
            print(f"warning: anybody who reaches {options.host} may use this page", file=sys.stderr)
        with (Remote(options) if options.server else Local(options, engine_options)) as backend:
            show(backend, options, sampling)
    return 0


def show(backend, options: UiOptions, sampling: SamplingParams):
    """The page until a signal ends it."""
    from .page import build, launch
    ended = threading.Event()
    page = launch(build(backend, sampling), options.host, options.port)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *event: ended.set())
    print(f"ready: {backend.name} at http://{options.host}:{options.port}", file=sys.stderr)
    ended.wait()
    page.close(verbose=False)


class Local:
    """An engine of this process; the questions of several visitors are decoded together, as in the service."""

    def __init__(self, options: UiOptions, engine_options: EngineOptions):
        from runtime import Engine
        from runtime.serve.engine_thread import Worker
        self.engine = Engine(options.model, **vars(engine_options))
        family = self.engine.family
        self.name, self.longest, self._language = family.name, self.engine.max_model_len, options.language
        self.pictures, self.system = family.vision is not None, takes_system(family)
        self.released = family.sampling(self.pictures)
        self._worker = Worker(lambda: self.engine, lambda: os.kill(os.getpid(), signal.SIGTERM), lambda answer: None)

    def __enter__(self):
        print("\n".join(self.engine.describe()), file=sys.stderr)
        self._worker.start()
        return self

    def __exit__(self, *error):
        self._worker.stop()
        if self._worker.failure:
            raise self._worker.failure

    async def stream(self, messages: list[dict], sampling: SamplingParams):
        """Yields the answer in pieces; messages are as Engine.prompt takes them, with paths of pictures."""
        prompt = await asyncio.get_running_loop().run_in_executor(self._worker.pool, self._prompt, messages)
        async with self._worker.answer(prompt, sampling) as answer:
            async for piece in answer:
                yield piece.text

    def _prompt(self, messages):
        from runtime.serve.pictures import PictureRules
        rules = PictureRules(count=0, bytes=MAX_PICTURE, pixels=MAX_PIXELS)
        return self.engine.prompt(with_pictures(messages, lambda path: {
            "type": "image", "image": rules.decode(Path(path).read_bytes())}), language=self._language)


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
            raise ToolkitError(f"--server {options.server} does not list a model: {said(error)}; is the URL that of an OpenAI-"
                               "compatible server, and --api-key its key?") from None
        self.name, self.longest = card.id, getattr(card, "max_model_len", None) or 4096
        self._client = openai.AsyncOpenAI(**known)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    async def stream(self, messages: list[dict], sampling: SamplingParams):
        """Yields the answer in pieces, as Local.stream."""
        from openai import omit
        given = {name: omit if value is None else value for name, value in vars(sampling).items()
                 if name in ("temperature", "top_p", "max_tokens")}
        more = {name: getattr(sampling, name) for name in ("top_k", "repetition_penalty")
                if getattr(sampling, name) is not None}
        answer = await self._client.chat.completions.create(
            model=self.name, messages=with_pictures(messages, as_data_uri), stream=True, extra_body=more, **given)
        async with answer:
            async for chunk in answer:
                if chunk.choices:
                    yield chunk.choices[0].delta.content or ""


def takes_system(family) -> bool:
    """Do this family's prompts have a place for a system message?"""
    from models.family import ModelError
    try:
        family.prompt([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}], family.languages[0])
    except ModelError:
        return False
    return True


def with_pictures(messages: list[dict], part) -> list[dict]:
    """The messages with part(path) in place of every picture."""
    return [message if isinstance(message["content"], str) else
            {**message, "content": [part(p["image"]) if p["type"] == "image" else p for p in message["content"]]}
            for message in messages]


def as_data_uri(path: str) -> dict:
    kind = mimetypes.guess_type(path)[0] or "image/png"
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


def said(error: Exception) -> str:
    """One sentence for the visitor; of a server's error only its message."""
    body = getattr(error, "body", None)
    return (isinstance(body, dict) and body.get("message")) or str(error)


def conversation(history: list[dict], question: str, pictures: list[str], system: str) -> list[dict]:
    """What the page shows, and the new question, as chat messages. Answers that were stopped at once are left out with
    their question, for no model was trained on two questions in a row."""
    messages = [{"role": "system", "content": system.strip()}] if system.strip() else []
    for turn in history:
        files = [part["file"]["path"] for part in turn["content"] if part["type"] == "file"]
        text = "".join(part["text"] for part in turn["content"] if part["type"] == "text")
        if turn["role"] == "user":
            asked = {"role": "user", "content": content(text, files)}
        elif text:
            messages += [asked, {"role": "assistant", "content": text}]
    return [*messages, {"role": "user", "content": content(question, pictures)}]


if __name__ == "__main__":
    sys.exit(run_command(main))
