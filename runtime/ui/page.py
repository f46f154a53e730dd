"""The page: Gradio's chat with our settings, in two languages, cut off from every other site.

Takes a backend and the first values of the sliders, returns the running page.
"""

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

from .backends import user_message
from .conversation import chat_messages
from .options import MAX_IMAGE_BYTES
from .wording import CHINESE, ENGLISH

DEMO_IMAGES = Path(__file__).resolve().parents[2] / "examples" / "demo" / "pictures"
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
SLIDERS = {  # field of SamplingParams: least, most, step
    "temperature": (0, 2, 0.05),
    "top_p": (0.05, 1, 0.05),
    "top_k": (0, 200, 1),
    "repetition_penalty": (1, 2, 0.05),
}
CSS = """
.example { border: 1px solid var(--border-color-primary) !important; border-radius: 12px; padding: 12px }
/* the layer that says "busy" would lie over the stop button and take its clicks */
.block:has(textarea) > [data-testid="status-tracker"] { display: none }
/* shares on a site that this page does not talk to */
.download-link + button { display: none }
footer .divider { display: none }
"""
I18N = gr.I18n(en=ENGLISH, zh=CHINESE, **{"zh-CN": CHINESE})


def build_page(backend, given: SamplingParams) -> gr.ChatInterface:
    """backend: backends.Local or backends.Remote. given: how the sliders begin. The conversation
    lives in the browser's session."""
    controls = make_controls(backend, given)
    page = gr.ChatInterface(
        answer_function(backend),
        multimodal=backend.takes_images,
        title=backend.name,
        additional_inputs=controls,
        chatbot=chatbot(),
        textbox=textbox(backend.takes_images),
        examples=[[example] for example in examples(backend.takes_images)],
        additional_inputs_accordion=gr.Accordion(I18N("settings"), open=False),
        analytics_enabled=False,
        concurrency_limit=None,
        delete_cache=(600, 3600),
        api_visibility="private",
        cache_examples=False,
    )
    released = controls[1]
    sliders = controls[2 : 2 + len(SLIDERS)]
    with page:
        released.change(
            lambda ticked: [gr.update(interactive=not ticked)] * len(SLIDERS),
            released,
            sliders,
            api_visibility="private",
            queue=False,
        )
    return page


def answer_function(backend):
    """What Gradio calls for a question, with the values of `make_controls`."""

    async def answer(message, history, *values):
        """Yields what is known of the answer so far. Stop closes it, and with it the request."""
        text, files = split_message(message)
        system, sampling = read_controls(*values)
        messages = chat_messages(history, text, files, system)
        answered = ""
        try:
            async with aclosing(backend.stream(messages, sampling)) as pieces:
                async for piece in pieces:
                    answered += piece
                    yield answered
        except Exception as error:
            # raised, it would leave the page with a closed box and no conversation
            gr.Warning(visitor_message(error), duration=None)
            yield answered

    return answer


def split_message(message: str | dict) -> tuple[str, list[str]]:
    """Text and paths of what the visitor sent."""
    if isinstance(message, str):
        return message, []
    return message["text"], [path_of(file) for file in message["files"]]


def path_of(file: str | dict) -> str:
    """On retry Gradio passes files as dicts with a path."""
    return file if isinstance(file, str) else file["path"]


def visitor_message(error: Exception) -> str:
    """One sentence; the traceback of an error that nobody foresaw goes to the command's output."""
    if isinstance(error, (UserError, ApiError, OpenAIError)):
        return user_message(error)
    traceback.print_exception(error)
    return "internal error; what the command printed says more"


def make_controls(backend, given: SamplingParams) -> list:
    """System prompt, "as released", the SLIDERS, max_tokens; with the values of `given` first."""
    defaults = backend.released_sampling
    if defaults is None:
        defaults = SamplingDefaults(backend.max_model_len, temperature=0.8, top_p=0.8, top_k=50)
    released = all(getattr(given, name) is None for name in SLIDERS)
    controls = [
        gr.Textbox(
            "",
            label=I18N("system"),
            info=I18N("system_info"),
            lines=2,
            visible=backend.takes_system,
        ),
        gr.Checkbox(released, label=I18N("released"), info=I18N("released_info")),
    ]
    for name, (least, most, step) in SLIDERS.items():
        value = getattr(given, name)
        if value is None:
            value = getattr(defaults, name)
        controls.append(slider(name, least, most, value, step, interactive=not released))
    longest = backend.max_model_len
    max_tokens = given.max_tokens or min(512, longest)
    return [*controls, slider("max_tokens", 1, longest, max_tokens, 1)]


def slider(name: str, least, most, value, step, **more) -> gr.Slider:
    label = I18N(name)
    info = I18N(name + "_info")
    return gr.Slider(least, most, value, step=step, label=label, info=info, **more)


def read_controls(system, released, *values) -> tuple[str, SamplingParams]:
    """The values of `make_controls` -> the system prompt and how to sample."""
    *of_sliders, max_tokens = values
    given = {} if released else dict(zip(SLIDERS, of_sliders))
    if given:
        given["top_k"] = int(given["top_k"])
    return system or "", SamplingParams(max_tokens=int(max_tokens), **given)


def chatbot() -> gr.Chatbot:
    return gr.Chatbot(
        show_label=False,
        scale=1,
        height="68vh",
        buttons=["copy"],
        allow_tags=False,
        feedback_options=None,
    )


def textbox(takes_images: bool):
    if not takes_images:
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


def examples(takes_images: bool) -> list:
    """Questions in both languages: about the demo's images, or the built-in ones without one."""
    file = DEMO_IMAGES / "questions.jsonl"
    if not takes_images or not file.exists():  # an installed package has no demo
        return [question.text for question in QUESTIONS if not question.scene]
    found = []
    for line in file.read_text(encoding="utf-8").splitlines():
        question = json.loads(line)
        image = question["image"]
        if (image, question["kind"], question["lang"]) in EXAMPLES:
            found.append({"text": question["prompt"], "files": [str(DEMO_IMAGES / image)]})
    return found


class ContentPolicy:
    """ASGI middleware: the browser loads nothing from elsewhere, not even an image that an answer's
    Markdown names."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *HEADERS]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


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
            app_kwargs={"middleware": [Middleware(ContentPolicy)]},
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
