"""What a stranger wrote does not steer the terminal."""

import io
import json
import struct
import sys

import pytest
from paths import GOLDEN

from models.errors import ModelError
from models.terminal import for_stdout, printable
from quant.validate import command
from quant.validate.findings import Finding
from runtime.chat import main as chat
from runtime.common.errors import run_command
from runtime.common.notes import note
from runtime.common.progress import print_status

STEERING = "\x1b]0;title\x07\x1b[2J\x9b31m\r"
SHOWN = r"\x1b]0;title\x07\x1b[2J\x9b31m"


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_printable():
    assert printable(STEERING) == SHOWN
    assert printable("你好, world\n\t😀é") == "你好, world\n\t😀é"


def test_answers_on_a_terminal_and_in_a_pipe(monkeypatch):
    """Whoever pipes an answer gets it as it is."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert for_stdout(STEERING) == STEERING
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert for_stdout(STEERING) == SHOWN


def test_errors_notes_and_status_lines(capsys):
    def main(argv):
        print_status(f"status {STEERING}")
        note(f"note {STEERING}")
        raise ModelError(f"file {STEERING}")

    assert run_command(main, []) == 2
    shown = [f"status {SHOWN}", f"note {SHOWN}", f"error: file {SHOWN}"]
    assert capsys.readouterr().err.splitlines() == shown


def test_findings_of_a_quantised_folder(monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal())
    findings = type("Findings", (), {"found": [Finding(STEERING, ())]})
    command._print_text(findings, {})
    assert sys.stdout.getvalue() == f"note: {SHOWN}\n"


@pytest.mark.parametrize("name", ["model.safetensors", f"model-{SHOWN[:4]}\x1b[2J.safetensors"])
def test_names_in_and_of_a_strangers_files(name, tmp_path, capsys):
    for file in (GOLDEN / "glm_edge").glob("*.json"):
        if "index" not in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    header = json.dumps({STEERING: tensor}).encode()
    (tmp_path / name).write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert run_command(chat, ["--model", str(tmp_path), "--prompt", "hi"]) == 2
    told = capsys.readouterr()
    assert "\x1b" not in told.err + told.out and "\x9b" not in told.err
    assert SHOWN in told.err
