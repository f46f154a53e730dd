"""One export in all: what `python -m convert` wrote is found by chat, serve, bench and predict, in the
README's order, without --artifact, and nothing is exported again."""

import json
import os

import paths
import pytest
from http_service import Server, data_uri

from convert.__main__ import main as convert
from runtime import chat
from runtime.bench import __main__ as bench
from runtime.common.errors import run_command
from runtime.predict import __main__ as predict
from runtime.vision import artifact, onnx_session

GOLDEN = paths.GOLDEN / "visualglm"
MODEL = ["--model", str(GOLDEN)]
PICTURE = GOLDEN / "image.png"
QUESTION = ["--image", str(PICTURE), "--prompt", "描述"]


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """The artifact folder, outside the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ASCEND_VLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("convert.atc.run.find_atc", lambda: None)
        out = tmp_path_factory.mktemp("artifact")
        assert run_command(convert, [*MODEL, "--out", str(out)]) == 0
        yield out


@pytest.fixture
def opened(converted, monkeypatch):
    """The folders of which a session was opened; an export is an error."""
    folders = []
    plain = onnx_session.OnnxVision.__init__

    def record(session, directory, *rest):
        folders.append(directory)
        plain(session, directory, *rest)

    def refuse(*rest):
        raise AssertionError("exported again")

    monkeypatch.setattr(onnx_session.OnnxVision, "__init__", record)
    monkeypatch.setattr(artifact, "_convert", refuse)
    before = state(converted)
    yield folders
    assert folders == [converted] and state(converted) == before


def state(folder):
    return {file.name: os.stat(file).st_mtime_ns for file in folder.glob("vision*")}


def test_chat(opened, capsys):
    assert run_command(chat.main, [*MODEL, *QUESTION, "--max-tokens", "2"]) == 0
    assert f"artifact {opened[0]}" in capsys.readouterr().err


def test_bench(opened, tmp_path, capsys):
    argv = [*MODEL, *QUESTION, "--demo", "--output-len", "2", "--out", str(tmp_path)]
    assert run_command(bench.main, argv) == 0
    assert "picture process time" in capsys.readouterr().err


def test_predict(opened, tmp_path):
    (tmp_path / "a.png").write_bytes(PICTURE.read_bytes())
    lines = [{"id": i, "prompt": "描述", "image": "a.png"} for i in range(2)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    files = ["--input", str(tmp_path / "q.jsonl"), "--out", str(tmp_path / "a.jsonl")]
    assert run_command(predict.main, [*MODEL, *files, "--max-tokens", "2"]) == 0
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2


def test_serve(opened):
    content = [
        {"type": "image_url", "image_url": {"url": data_uri(PICTURE.read_bytes())}},
        {"type": "text", "text": "描述"},
    ]
    server = Server(*MODEL, "--vision", "auto")
    try:
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
        answer = server.post("/v1/chat/completions", body)
        assert answer.status_code == 200, answer.text
    finally:
        server.stop()
