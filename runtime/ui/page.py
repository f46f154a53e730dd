"""The page of `python -m runtime.ui`: Gradio's chat with our settings, in two languages, cut off from every other site."""

import json
import traceback
from contextlib import aclosing
from pathlib import Path

import gradio as gr
from openai import OpenAIError
from starlette.middleware import Middleware

from models.errors import UserError
from models.family import SamplingDefaults
from runtime.common.errors import ToolkitError
from runtime.common.sample_questions import QUESTIONS
from runtime.engine.options import SamplingParams
from runtime.serve.errors import ApiError

from .backends import said
from .conversation import conversation
from .options import MAX_IMAGE_BYTES
from .wording import CHINESE, ENGLISH

PICTURES = Path(__file__).resolve().parents[2] / "examples" / "demo" / "pictures"
EXAMPLES = (
    ("scene10000.png", "describe", "en"),
    ("scene10000.png", "describe", "zh"),
    ("scene10001.png", "extreme", "en"),
    ("scene10002.png", "color", "zh"),
)
HEADERS = [
    (
        b"content-security-policy",
        b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
        b"frame-ancestors 'none'; form-action 'self'",
    ),
    (b"referrer-policy", b"no-referrer"),
]
OWN = ("temperature", "top_p", "top_k", "repetition_penalty")
CSS = """
.example { border: 1px solid var(--border-color-primary) !important; border-radius: 12px; padding: 12px }
/* the layer that says "busy" would lie over the stop button and take its clicks */
.block:has(textarea) > [data-testid="status-tracker"] { display: none }
/* shares on a site that this page does not talk to */
.download-link + button { display: none }
footer .divider { display: none }
"""
I18N = gr.I18n(en=ENGLISH, zh=CHINESE, **{"zh-CN": CHINESE})


def build(backend, given: SamplingParams) -> gr.ChatInterface:
    """backend: ui.Local or ui.Remote; given: how the sliders begin. The conversation lives in the browser's session."""
    controls = settings(backend, given)

    async def answer(message, history, *values):
        """Yields what is known of the answer so far. Stop closes it, and with it the request."""
        text, files = (
            (message, [])
            if isinstance(message, str)
            else (message["text"], [*map(path_of, message["files"])])
        )
        system, sampling = chosen(*values)
        told = ""
        try:
            async with aclosing(
                backend.stream(conversation(history, text, files, system), sampling)
            ) as pieces:
                async for piece in pieces:
                    told += piece
                    yield told
        except (
            Exception
        ) as error:  # raised, it would leave the page with a closed box and no conversation
            gr.Warning(sentence(error), duration=None)
            yield told

    page = gr.ChatInterface(
        answer,
        multimodal=backend.pictures,
        title=backend.name,
        additional_inputs=controls,
        chatbot=gr.Chatbot(
            show_label=False,
            scale=1,
            height="68vh",
            buttons=["copy"],
            allow_tags=False,
            feedback_options=None,
        ),
        textbox=textbox(backend.pictures),
        examples=[[example] for example in examples(backend.pictures)],
        additional_inputs_accordion=gr.Accordion(I18N("settings"), open=False),
        analytics_enabled=False,
        concurrency_limit=None,
        delete_cache=(600, 3600),
        api_visibility="private",
        cache_examples=False,
    )
    with page:
        controls[1].change(
            lambda released: [gr.update(interactive=not released)] * 4,
            controls[1],
            controls[2:6],
            api_visibility="private",
            queue=False,
        )
    return page


def path_of(file: str | dict) -> str:
    """A question that is asked again names its pictures as the conversation does."""
    return file if isinstance(file, str) else file["path"]


def sentence(error: Exception) -> str:
    """What the visitor is told; the traceback of an error that nobody foresaw is for the command's own output."""
    if isinstance(error, (UserError, ApiError, OpenAIError)):
        return said(error)
    traceback.print_exception(error)
    return "internal error; what the command printed says more"


def settings(backend, given: SamplingParams) -> list:
    """System prompt, "as released", temperature, top_p, top_k, repetition_penalty, max_tokens; first as `given`."""
    known = backend.released or SamplingDefaults(backend.longest, 0.8, 0.8, 50, 1.0)
    released = all(getattr(given, name) is None for name in OWN)

    def slider(name, least, most, step):
        value = getattr(known if getattr(given, name) is None else given, name)
        return gr.Slider(
            least,
            most,
            value,
            step=step,
            label=I18N(name),
            info=I18N(name + "_info"),
            interactive=not released,
        )

    return [
        gr.Textbox(
            "", label=I18N("system"), info=I18N("system_info"), lines=2, visible=backend.system
        ),
        gr.Checkbox(released, label=I18N("released"), info=I18N("released_info")),
        slider("temperature", 0, 2, 0.05),
        slider("top_p", 0.05, 1, 0.05),
        slider("top_k", 0, 200, 1),
        slider("repetition_penalty", 1, 2, 0.05),
        gr.Slider(
            1,
            backend.longest,
            given.max_tokens or min(512, backend.longest),
            step=1,
            label=I18N("max_tokens"),
            info=I18N("max_tokens_info"),
        ),
    ]


def chosen(system, released, *values) -> tuple[str, SamplingParams]:
    """The values of `settings` -> the system prompt and how to sample."""
    *own, max_tokens = values
    own = {} if released else {**dict(zip(OWN, own)), "top_k": int(own[2])}
    return system or "", SamplingParams(max_tokens=int(max_tokens), **own)


def textbox(pictures: bool):
    if not pictures:
        return gr.Textbox(
            placeholder=I18N("ask_text"), submit_btn=True, stop_btn=True, autofocus=True, scale=7
        )
    return gr.MultimodalTextbox(
        placeholder=I18N("ask"),
        file_types=["image"],
        file_count="multiple",
        sources=["upload"],
        submit_btn=True,
        stop_btn=True,
        autofocus=True,
        scale=7,
    )


def examples(pictures: bool) -> list:
    """Questions in both languages: about the demo's pictures, or the built-in ones without a picture."""
    file = PICTURES / "questions.jsonl"
    if not pictures or not file.exists():  # an installed package has no demo
        return [question.text for question in QUESTIONS if not question.scene]
    known = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [
        {"text": q["prompt"], "files": [str(PICTURES / q["image"])]}
        for q in known
        if (q["image"], q["kind"], q["lang"]) in EXAMPLES
    ]


class Secluded:
    """ASGI middleware: the browser loads nothing from elsewhere, not even a picture that an answer's Markdown names."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def guarded(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        await self.app(scope, receive, guarded)


def launch(page, host: str, port: int):
    """Returns the running page. ToolkitError when the port is taken."""
    try:
        page.launch(
            server_name=host,
            server_port=port,
            share=False,
            inbrowser=False,
            quiet=True,
            prevent_thread_lock=True,
            footer_links=["settings"],
            run_history=False,
            max_file_size=MAX_IMAGE_BYTES,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            i18n=I18N,
            theme=theme(),
            css=CSS,
            app_kwargs={"middleware": [Middleware(Secluded)]},
        )
    except OSError as error:
        raise ToolkitError(
            f"--port {port} on {host} cannot be listened on; give another one"
        ) from error
    return page


def theme():
    """System fonts: the usual ones come from a font site."""
    fonts = [
        "system-ui",
        "Segoe UI",
        "PingFang SC",
        "Microsoft YaHei",
        "Noto Sans CJK SC",
        "sans-serif",
    ]
    return gr.themes.Soft(font=fonts, font_mono=["ui-monospace", "Consolas", "monospace"])
