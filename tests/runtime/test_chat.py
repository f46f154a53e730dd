"""The chat command on the tiny golden checkpoint: one-shot, a whole conversation from stdin, and a terminal."""

import io
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import paths
import pytest

from runtime import chat
from runtime.common.errors import run_command

ROOT = paths.ROOT
GOLDEN = paths.GOLDEN / "visualglm"
PICTURE = str(GOLDEN / "image.png")
FIXED = ["--vision", "torch", "--temperature", "0", "--repetition-penalty", "1"]


def run(monkeypatch, capsys, *argv, typed=""):
    """(exit code, stdout, stderr) of the command, `typed` being its stdin."""
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO(typed.encode()), encoding="utf-8")
    )
    code = run_command(chat.main, ["--model", str(GOLDEN), *FIXED, *argv])
    return code, *capsys.readouterr()


@pytest.fixture
def say(monkeypatch, capsys):
    return lambda *argv, **given: run(monkeypatch, capsys, *argv, **given)


def test_one_shot_puts_only_the_answer_on_stdout(say):
    code, out, err = say("--image", PICTURE, "--prompt", "你好", "--max-tokens", "6")
    assert code == 0 and out.strip("\n") and out.endswith("\n")
    assert "decoder: " in err and "answer 6 tokens" in err and "cut at --max-tokens 6" in err
    assert say("--image", PICTURE, "--prompt", "-", "--max-tokens", "6", typed="你好\n")[1] == out


def test_show_prompt(say):
    code, out, err = say("--prompt", "hi", "--language", "en", "--max-tokens", "1", "--show-prompt")
    assert (
        code == 0
        and "prompt text: 'Q:hi\\nA:'" in err
        and "prompt ids (" in err
        and "prompt" not in out
    )


def test_length_limit_is_told(say):
    _, _, err = say("--prompt", "hi", "--max-model-len", "20")
    assert "cut because prompt and answer reached 20 tokens" in err


def test_conversation_keeps_its_history(say):
    code, out, err = say(
        "--max-tokens",
        "4",
        "--show-prompt",
        typed="one\n\ntwo\n/history\n/clear\nthree\n/history\n",
    )
    assert code == 0 and "输入问题" in err
    prompts = [line for line in err.splitlines() if line.startswith("prompt text")]
    assert len(prompts) == 3
    assert (
        "one" in prompts[1]
        and "two" in prompts[1]
        and "one" not in prompts[2]
        and "two" not in prompts[2]
    )
    assert "Q: one\nA: " in err and err.rstrip().split("conversation cleared")[1].count("Q: ") == 1


def test_pictures_come_and_go(say):
    typed = f"/image {PICTURE}\nwhat\nand\n/image none.png\n/image\nwhat\n"
    _, _, err = say("--max-tokens", "2", "--show-prompt", typed=typed)
    prompts = [line for line in err.splitlines() if line.startswith("prompt text")]
    assert ["<img>" in p for p in prompts] == [True, True, False]
    assert "error: picture none.png does not exist" in err and "picture: none" in err


@pytest.fixture
def drop(tmp_path, monkeypatch):
    """A folder with pictures of odd names, which is the home, too."""
    for name in (
        "my photo.jpg",
        "it's.png",
        "plain.png",
        "back\\slash.png",
        "50%20.png",
        '"q".png',
    ):
        (tmp_path / name).write_bytes(Path(PICTURE).read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "typed, name",
    [
        (r"{}/my\ photo.jpg", "my photo.jpg"),
        (r"{}/my\ photo.jpg ", "my photo.jpg"),
        ("'{}/my photo.jpg'", "my photo.jpg"),
        ('"{}/my photo.jpg"', "my photo.jpg"),
        ("{}/my photo.jpg", "my photo.jpg"),
        ("file://{}/my%20photo.jpg", "my photo.jpg"),
        ("file://localhost{}/my%20photo.jpg", "my photo.jpg"),
        ("'file://{}/my%20photo.jpg'", "my photo.jpg"),
        ("~/plain.png", "plain.png"),
        ("{}/it's.png", "it's.png"),
        (r"{}/it\'s.png", "it's.png"),
        (r"{}/back\slash.png", "back\\slash.png"),
        ("{}/50%20.png", "50%20.png"),
        ('{}/"q".png', '"q".png'),
    ],
)
def test_a_file_dropped_into_the_terminal(typed, name, drop):
    found = os.path.expanduser(chat.typed_path(typed.format(drop)))
    assert found == str(drop / name)


def test_a_dropped_file_is_opened(say, drop):
    typed = f"/image\t{drop}/my\\ photo.jpg\n/image ~none-such/x.png\n/image a b\n/history\n"
    code, out, err = say(typed=typed)
    assert code == 0 and f"picture: {drop}/my photo.jpg; a new conversation" in err
    assert "picture ~none-such/x.png does not exist" in err and "picture a b does not exist" in err


@pytest.mark.parametrize("word", ["/stop", "/exit", "stop"])
def test_words_that_end(word, say):
    code, out, _ = say(typed=f"/help\n{word}\nnever asked\n")
    assert code == 0 and out == ""


def test_unknown_command_and_too_long_question_do_not_end_the_chat(say):
    code, out, err = say(
        "--max-model-len", "64", "--max-tokens", "2", typed=f"/picture x\n{'long ' * 200}\nhi\n"
    )
    assert code == 0 and "/picture is no command" in err and "maximum length 64" in err
    assert "answer 2 tokens" in err and out.count("\n") >= 1


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "x", "--image", "none.png"], "none.png does not exist"),
        (["--prompt", "x", "--image", PICTURE, "--image", PICTURE], "takes one picture"),
        (["--prompt", "x", "--image", str(GOLDEN)], "is a folder; name one picture file"),
        (["--prompt", "x" * 5000], "maximum length"),
        (["--prompt", "x", "--max-model-len", "999999"], "--max-model-len 999999"),
    ],
)
def test_mistakes(argv, sentence, say):
    code, out, err = say(*argv)
    last = err.splitlines()[-1]
    assert (code, out) == (2, "") and last.startswith("error: ") and sentence in last


def test_wrong_folder(say, tmp_path):
    code, _, err = say("--model", str(tmp_path), "--prompt", "x")
    assert code == 2 and "config.json is missing" in err


def test_undecodable_argument_is_no_traceback():
    assert chat.one_question("caf\udce9") == "caf�"


def hear_interrupts():
    """A test run in the background of a shell ignores Ctrl-C, and its children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Terminal:
    """The command on a pseudo-terminal; `read_until` waits for text, `interrupt` is Ctrl-C."""

    def __init__(self, *argv):
        self._ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "runtime.chat", "--model", str(GOLDEN), *FIXED, *argv]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            preexec_fn=hear_interrupts,
        )
        os.close(theirs)
        self.seen = ""

    def read_until(self, text, seconds=300):
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} did not come; seen: {self.seen!r}"
            self.seen += os.read(self._ours, 4096).decode(errors="replace")
        _, self.seen = self.seen.split(text, 1)

    def type(self, text):
        os.write(self._ours, text.encode())

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)


def test_terminal_interrupts():
    terminal = Terminal("--max-tokens", "1800")
    terminal.read_until("> ")
    terminal.type("hello\n")
    terminal.read_until("hello\r\n")
    time.sleep(0.3)
    terminal.interrupt()
    terminal.read_until("已中止")
    terminal.read_until("> ")
    time.sleep(0.3)  # readline shows its prompt a moment before it hears Ctrl-C
    terminal.interrupt()
    terminal.read_until("bye")
    assert terminal.process.wait(30) == 130


def test_terminal_end_of_input():
    terminal = Terminal()
    terminal.read_until("> ")
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0


def test_sampling_of_the_releases_chat_is_printed(capsys):
    """Without a sampling flag; with one, nothing is added that nobody named."""
    argv = ["--model", str(GOLDEN), "--vision", "torch", "--image", PICTURE, "--prompt", "x"]
    argv += ["--max-tokens", "1"]
    assert run_command(chat.main, argv) == 0
    printed = capsys.readouterr().err
    assert "sampling as in the release's chat: temperature 0.8, top p 0.4, top k 100" in printed
    assert "repetition penalty 1.2" in printed
    assert run_command(chat.main, [*argv, "--temperature", "0"]) == 0
    assert "sampling as in" not in capsys.readouterr().err
