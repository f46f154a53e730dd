"""The page: what it asks, of whom; and, with `make test-ui`, in headless Chromium as a visitor sees it."""

import asyncio
import contextlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import paths
import pytest

from models import family_of
from runtime import SamplingParams
from runtime.common.errors import run_command
from runtime.engine.options import EngineOptions
from runtime.ui import __main__ as ui
from runtime.ui import backends
from runtime.ui.conversation import chat_messages
from runtime.ui.options import UiOptions

ROOT = paths.ROOT
GOLDEN = paths.GOLDEN
DEMO = ROOT / "examples" / "demo"
PICTURE = DEMO / "pictures" / "scene10000.png"
DESCRIBED = "purple circle, orange circle, blue cross"
SHORTEST = "purple"  # its first token
GREEDY = SamplingParams(temperature=0, repetition_penalty=1, max_tokens=8)


def turn(role, text="", *files):
    return {
        "role": role,
        "content": [
            *({"type": "file", "file": {"path": f}} for f in files),
            {"type": "text", "text": text},
        ],
    }


def test_a_conversation_becomes_messages():
    history = [
        turn("user", "What?", "a.png"),
        turn("assistant", "A cat."),
        turn("user", "stopped at once"),
        turn("assistant"),
        turn("user", "failed"),
    ]
    assert chat_messages(history, "And?", ["b.png"], " Be brief. ") == [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}],
        },
        {"role": "assistant", "content": "A cat."},
        {
            "role": "user",
            "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "And?"}],
        },
    ]
    assert chat_messages([], "Hi", [], "  ")[0]["role"] == "user"


@pytest.mark.parametrize("name, takes", [("visualglm", False), ("glm4", True)])
def test_a_system_prompt_only_where_the_family_has_one(name, takes):
    folder = next(
        folder
        for folder in (GOLDEN / name, *(GOLDEN / name).glob("*"))
        if (folder / "config.json").exists()
    )
    assert backends.takes_system(family_of(folder)) is takes


@pytest.fixture
def local():
    options = UiOptions(model=str(DEMO / "checkpoint"))
    with backends.Local(options, EngineOptions(vision="torch", max_model_len=256)) as backend:
        yield backend


def asked(text="Describe the picture."):
    return chat_messages([], text, [str(PICTURE)], "")


def test_its_cache_holds_one_sequence(local):
    assert local.engine.plan.cache_tokens == local.engine.max_model_len == 256


def test_an_engine_of_its_own_answers(local):
    async def told():
        return [
            piece
            async for piece in local.stream(
                asked(), SamplingParams(temperature=0, repetition_penalty=1)
            )
        ]

    pieces = asyncio.run(told())
    assert "".join(pieces) == DESCRIBED and len(pieces) > 3


def test_a_visitor_who_stops_leaves_nothing_behind(local):
    async def stopped():
        async with contextlib.aclosing(
            local.stream(asked(), SamplingParams(max_tokens=100))
        ) as pieces:
            async for _ in pieces:
                return

    asyncio.run(stopped())
    end = time.monotonic() + 30
    while local.engine.busy and time.monotonic() < end:
        time.sleep(0.01)
    assert local.engine.load()[:2] == (0, 0)


def test_a_picture_that_is_none_is_refused_in_a_sentence(local, tmp_path):
    (tmp_path / "a.png").write_text("no picture")

    async def ask():
        async for _ in local.stream(chat_messages([], "?", [str(tmp_path / "a.png")], ""), GREEDY):
            pass

    with pytest.raises(Exception, match="is not a picture that can be read; use PNG"):
        asyncio.run(ask())


@pytest.mark.parametrize(
    "argv, sentence",
    [
        ([], "give either --model DIR or --server URL"),
        (["--model", "x", "--server", "http://x"], "give either"),
        (["--model", "nowhere"], "does not exist"),
        (["--server", "localhost:8000"], "use a URL such as"),
        (["--server", "http://x", "--language", "zh"], "the server words the prompt"),
        (["--server", "http://x", "--dtype", "bf16"], "leave out the options of the model"),
        (["--model", str(DEMO), "--port", "0"], "use a port from 1 to 65535"),
    ],
)
def test_mistakes(argv, sentence, capsys):
    assert run_command(ui.main, argv) == 2
    assert sentence in capsys.readouterr().err


def test_gradio_is_missing(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert run_command(ui.main, ["--model", str(DEMO / "checkpoint")]) == 3
    assert "the page needs gradio; run: pip install 'ascend-vlm[ui]'" in capsys.readouterr().err


def test_a_server_that_is_not_there():
    with pytest.raises(
        ui.ToolkitError, match="does not list a model: Connection error.; is the URL"
    ):
        backends.Remote(UiOptions(server="http://127.0.0.1:9"))


def test_the_cache_holds_one_sequence(monkeypatch):
    opened = []

    def open_engine(model, options):
        opened.append(options.max_num_seqs)
        raise ui.ToolkitError("opened")

    monkeypatch.setattr(backends, "open_engine", open_engine)
    for given in (None, 3):
        with pytest.raises(ui.ToolkitError, match="opened"):
            backends.Local(UiOptions(model="."), EngineOptions(max_num_seqs=given))
    assert opened == [1, 3]


def test_settings_become_sampling():
    pytest.importorskip("gradio", reason="run: make test-ui")
    from runtime.ui.page import examples, read_controls

    assert read_controls("Be brief.", True, 0.5, 0.9, 40.0, 1.1, 64.0) == (
        "Be brief.",
        SamplingParams(max_tokens=64),
    )
    assert read_controls("", False, 0, 0.9, 40.0, 1.1, 64.0) == (
        "",
        SamplingParams(max_tokens=64, temperature=0, top_p=0.9, top_k=40, repetition_penalty=1.1),
    )
    assert {Path(file).exists() for example in examples(True) for file in example["files"]} == {
        True
    }
    assert all(isinstance(example, str) for example in examples(False)) and examples(False)


def test_the_port_is_taken(capsys):
    pytest.importorskip("gradio", reason="run: make test-ui")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert run_command(ui.main, ["--model", str(DEMO / "checkpoint"), "--port", str(port)]) == 2
    assert (
        f"--port {port} of 127.0.0.1 is taken by another program; end it, or give another port"
        in capsys.readouterr().err
    )


# in a browser

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
browser_test = pytest.mark.skipif(
    not (CHROMIUM and all(map(importlib.util.find_spec, ("gradio", "playwright")))),
    reason="run: make test-ui",
)
PATIENCE = 60_000  # milliseconds, on a busy machine
# runs a command, as slow as with a large model if need be, and writes down every address that it talks to
WATCHED = """
import runpy, sys, time
addresses = open(sys.argv[1], "a", buffering=1)
def heard(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        print(repr(arguments[1] if event == "socket.connect" else arguments[0]), file=addresses)
sys.addaudithook(heard)
from runtime import Engine
step, pause = Engine.step, float(sys.argv[2])
Engine.step = lambda engine: time.sleep(pause) or step(engine)
sys.argv = sys.argv[3:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def running(module, folder, *argv, pause=0):
    """A command until it is ready -> its URL. Afterwards: it ended by SIGTERM without an error. pause: seconds per step."""
    port = free_port()
    log = folder / f"{module}.log"
    command = [
        sys.executable,
        "-c",
        WATCHED,
        folder / "addresses",
        str(pause),
        module,
        "--port",
        str(port),
        *argv,
    ]
    with open(log, "w") as stream:
        process = subprocess.Popen(
            command, cwd=ROOT, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    try:
        end = time.monotonic() + 900
        while "ready: " not in log.read_text():
            assert time.monotonic() < end and process.poll() is None, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM) and "Traceback" not in log.read_text(), (
            log.read_text()
        )
    finally:
        process.kill()


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=FLAGS
        )  # with a profile of its own
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def demo_page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    with running(
        "runtime.ui",
        folder,
        "--model",
        str(DEMO / "checkpoint"),
        "--vision",
        "torch",
        "--temperature",
        "0",
        "--repetition-penalty",
        "1",
    ) as url:
        yield url
    for address in (folder / "addresses").read_text().splitlines():
        assert any(own in address for own in ("127.0.0.1", "localhost", "::1", "0.0.0.0")), (
            f"the process asked {address}"
        )


class Visit:
    """A page of the browser that notes what it asks for elsewhere."""

    def __init__(self, browser, url, **context):
        self.page = browser.new_context(**context).new_page()
        self.page.set_default_timeout(PATIENCE)
        self.elsewhere = []
        self.page.on(
            "request",
            lambda r: r.url.startswith((url, "data:", "blob:")) or self.elsewhere.append(r.url),
        )
        self.page.goto(url)
        self.box = self.page.locator("textarea").first
        self.box.wait_for()

    def upload(self, file):
        self.until(self.box.is_enabled)
        with (
            self.page.expect_file_chooser() as chooser
        ):  # the button forgets the file before, which may be the same
            self.page.get_by_test_id("upload-button").click()
        chooser.value.set_files(file)
        self.page.locator(".thumbnails img, .thumbnail-item img").first.wait_for()

    def ask(self, text):
        self.until(self.box.is_enabled)
        self.box.fill(text)
        self.box.press("Enter")

    def clear(self):
        self.page.get_by_label("Clear").first.click()
        self.until(lambda: not self.bots())

    def longest(self, tokens: int):
        """The longest answer; "How to answer" is open."""
        field, slider = (
            self.page.locator(f"input[type={kind}]").last for kind in ("number", "range")
        )

        def taken():  # not before the panel is alive
            field.fill(str(tokens))
            field.press("Tab")
            self.page.wait_for_timeout(500)
            return slider.input_value() == field.input_value() == str(tokens)

        self.until(taken)
        self.page.wait_for_timeout(500)  # until the server has it; the page shows nothing of that

    def bots(self) -> list[str]:
        return [text.strip() for text in self.page.locator(".message.bot").all_inner_texts()]

    def wait_for(self, text):
        """The last answer to be `text`, and whole."""
        self.until(
            lambda: not self.page.locator(".stop-button").count() and self.bots()[-1:] == [text]
        )

    def until(self, condition):
        """Asked from here: the page's security policy forbids what playwright's own waiting would evaluate in it."""
        end = time.monotonic() + PATIENCE / 1000
        while not condition():
            assert time.monotonic() < end, self.bots()
            self.page.wait_for_timeout(50)

    def shot(self, name):
        if os.environ.get("SHOTS"):
            Path(os.environ["SHOTS"]).mkdir(parents=True, exist_ok=True)
            self.page.wait_for_timeout(500)
            self.page.screenshot(path=f"{os.environ['SHOTS']}/{name}.png")

    def fits(self) -> bool:
        return self.page.evaluate("document.scrollingElement.scrollWidth <= innerWidth")


@browser_test
def test_ask_about_a_picture_ask_again_and_clear(chromium, demo_page):
    visit = Visit(chromium, demo_page, viewport={"width": 1280, "height": 800}, locale="en-US")
    assert visit.box.get_attribute("placeholder") == "Ask, and add pictures" and visit.fits()
    visit.shot("desktop-empty")
    visit.upload(PICTURE)
    visit.ask("How many objects are there?")
    visit.wait_for("3")
    visit.ask(
        "What color is the cross?"
    )  # the model was trained on single questions; it answers this one in a row
    visit.wait_for("blue")
    assert visit.bots() == ["3", "blue"]
    visit.shot("desktop")
    visit.clear()
    visit.page.get_by_text("How to answer").click()
    visit.longest(1)
    visit.upload(PICTURE)
    visit.ask("Describe the picture.")
    visit.wait_for(SHORTEST)
    visit.longest(100)
    visit.page.get_by_role("button", name="Retry").click()
    visit.wait_for(DESCRIBED)
    assert (
        visit.bots() == [DESCRIBED] and not visit.page.get_by_role("button", name="Share").count()
    )
    visit.page.get_by_role("button", name="Undo").click()
    visit.until(lambda: not visit.bots() and visit.box.input_value() == "Describe the picture.")
    visit.box.press("Enter")
    visit.wait_for(DESCRIBED)
    visit.clear()
    visit.upload(DEMO / "pictures" / "scene10002.png")
    visit.ask("What color is the triangle?")
    visit.wait_for("red")
    assert visit.bots() == ["red"] and visit.elsewhere == []


@browser_test
def test_chinese_dark_on_a_phone(chromium, demo_page):
    visit = Visit(
        chromium,
        demo_page,
        viewport={"width": 390, "height": 844},
        locale="zh-CN",
        color_scheme="dark",
    )
    assert visit.box.get_attribute("placeholder") == "输入问题，可添加图片" and visit.fits()
    assert visit.page.evaluate("document.body.classList.contains('dark')")
    visit.shot("phone-empty")
    visit.page.get_by_text("描述这张图片。").click()  # an example
    visit.wait_for("紫色圆形、橙色圆形、蓝色十字形")
    visit.shot("phone")
    visit.page.get_by_text("回答设置").click()
    visit.page.get_by_text("最长回答").wait_for()
    assert visit.fits() and visit.elsewhere == []
    visit.shot("phone-settings")


@browser_test
def test_stop_on_a_server_ends_its_request_there(chromium, tmp_path):
    """The golden checkpoint's random weights go on answering until they are stopped."""
    import httpx

    serve = ("--model", str(GOLDEN / "visualglm"), "--vision", "torch", "--api-key", "k")
    with running("runtime.serve", tmp_path, *serve, pause=0.05) as server:

        def running_requests():
            metrics = httpx.get(server + "/metrics", headers={"Authorization": "Bearer k"}).text
            return float(
                next(
                    line for line in metrics.splitlines() if "num_requests_running{" in line
                ).split()[-1]
            )

        with running(
            "runtime.ui",
            tmp_path,
            "--server",
            server,
            "--api-key",
            "k",
            "--max-tokens",
            "1900",
            "--temperature",
            "0",
            "--repetition-penalty",
            "1",
        ) as url:
            visit = Visit(chromium, url, viewport={"width": 1280, "height": 800}, locale="en-US")
            visit.ask("Tell me a story.")
            visit.until(lambda: any(len(text) > 15 for text in visit.bots()))
            told = visit.bots()[0]
            visit.until(lambda: len(visit.bots()[0]) > len(told))
            visit.shot("desktop-streaming")
            assert running_requests() == 1
            layers = visit.page.locator(".block:has(.stop-button) > [data-testid=status-tracker]")
            assert [layer.is_visible() for layer in layers.all()] == [False], (
                "it would take the clicks of the stop button"
            )
            visit.page.locator(".stop-button").click()
            visit.page.locator(".stop-button").wait_for(state="detached")
            end = time.monotonic() + 60
            while running_requests() and time.monotonic() < end:
                time.sleep(0.1)
            assert running_requests() == 0
            told = visit.bots()[0]
            visit.page.wait_for_timeout(500)
            assert visit.bots() == [told] and visit.elsewhere == []
            visit.ask(
                "x" * 20000
            )  # more than the model takes: the server's sentence, and the page goes on
            visit.page.get_by_text("maximum context length").wait_for()
            visit.shot("desktop-error")
            visit.until(
                lambda: len(visit.bots()) == 2 and not visit.page.locator(".stop-button").count()
            )
            visit.ask("And then?")
            visit.until(lambda: len(visit.bots()) == 3 and len(visit.bots()[2]) > 5)
            visit.page.locator(".stop-button").click()
            visit.page.locator(".stop-button").wait_for(state="detached")
            assert visit.bots()[:2] == [told, ""]
