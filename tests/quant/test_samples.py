"""The lines that a quantisation measures on and is judged by: what tells them apart."""

import json
import os
from importlib.util import find_spec

import paths
import pytest
from PIL import Image

from models import family_of
from models.errors import ModelError
from quant import pipeline
from quant.__main__ import main
from quant.calibration.samples import _tokens as answer_of
from quant.calibration.samples import calibration_lines, choose_lines, lines_key, make_samples
from quant.options import CalibrationOptions
from quant.work_folder import WorkFolder
from runtime.common.errors import ToolkitError

LLAVA = paths.GOLDEN / "llava"


def built_in():
    return choose_lines(family_of(LLAVA), CalibrationOptions()).calibration


def test_built_in_images_have_one_key():
    """Two runs draw the images anew; where they lie in memory says nothing about them."""
    first, second = built_in(), built_in()
    assert lines_key(first) == lines_key(second)
    image = second[-1]["messages"][0]["content"][0]["image"]
    image.putpixel((0, 0), (1, 2, 3))
    assert lines_key(first) != lines_key(second)


def test_image_files_count_by_their_content(tmp_path):
    """A picture that was changed under the same name is another sample."""
    parts = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "what?"}]
    line = {"messages": [{"role": "user", "content": parts}]}
    (tmp_path / "calib.jsonl").write_text(json.dumps(line))
    keys = []
    for colour in ("red", "red", "blue"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "a.png")
        keys.append(lines_key(calibration_lines(str(tmp_path / "calib.jsonl"))))
    assert keys[0] == keys[1] != keys[2]


def file_of(tmp_path, *lines):
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (tmp_path / "calib.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return str(tmp_path / "calib.jsonl")


def asked(content, role="user", **more):
    return {"messages": [{"role": role, "content": content, **more}]}


@pytest.mark.parametrize(
    "line, words",
    [
        ({"messages": [{"content": "hi"}, {"role": "user", "content": "a"}]}, "has no role"),
        ({"messages": [{"role": 5, "content": "hi"}]}, "has no role"),
        ({"messages": ["hi"]}, "of type str, not a dict"),
        ({"messages": 5}, "a list of dicts"),
        ({"messages": []}, "ask nothing"),
        (asked("hi", "assistant"), "ask nothing"),
        (asked(None), "has no content"),
        (asked(5), "a text or a list of parts"),
        (asked(["hi"]), "a content part is of type str"),
        (asked([{"type": "text"}]), "has no text"),
        (asked([{"type": "text", "text": 5}]), "has no text"),
        (asked([{"type": "image", "image": 5}]), "no file name"),
        (asked([{"type": "image"}]), "has no image"),
        (asked([{"type": "image", "image": "none.png"}]), "does not exist"),
        (asked([{"type": "image", "image": "/etc/passwd"}]), "--allowed-local-media-path"),
        (asked([{"type": "image", "image": "../a.png"}]), "--allowed-local-media-path"),
        (asked([{"type": "video"}]), "'video' is not known"),
        ({"text": 5}, "no calibration line"),
        ({"text": ["a"]}, "no calibration line"),
        ({"text": " "}, "no calibration line"),
        ({}, "no calibration line"),
        ([1], "no calibration line"),
        ({"ids": "5"}, "list of token ids"),
        ({"ids": []}, "list of token ids"),
        ({"ids": [1, True]}, "list of token ids"),
        ({"ids": [2**40]}, "list of token ids"),
        ("{", "no JSON"),
        ("[" * 50_000, "nested deeper"),
    ],
)
def test_the_line_that_is_wrong_is_named(line, words, tmp_path):
    file = file_of(tmp_path, {"text": "right"}, "", line)
    with pytest.raises(ToolkitError, match="line 3: ") as error:
        calibration_lines(file)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_what_lines_may_hold(tmp_path):
    file = file_of(
        tmp_path,
        "\ufeff" + json.dumps({"text": "a", "other": 1}),
        r'{"text": "cut \ud83d"}',
        {"inputs_pretokenized": "b", "text": None},
        asked([{"type": "text", "text": "c"}]),
    )
    assert calibration_lines(file) == [
        {"text": "a", "line": 1},
        {"text": "cut \ufffd", "line": 2},
        {"text": "b", "line": 3},
        {**asked([{"type": "text", "text": "c"}]), "line": 4},
    ]


def test_another_folder_of_pictures(tmp_path):
    (tmp_path / "here").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    file = file_of(tmp_path / "here", asked([{"type": "image", "image": "../a.png"}]))
    with pytest.raises(ToolkitError, match="line 1: .*lies outside"):
        calibration_lines(file)
    [line] = calibration_lines(file, tmp_path)
    [picture] = line["messages"][0]["content"]
    assert os.fspath(picture["image"]) == str(tmp_path / "a.png")


def test_what_the_model_cannot_be_asked_names_the_line():
    family = family_of(paths.GOLDEN / "glm_edge")
    line = {"messages": [{"role": "judge", "content": "x"}], "line": 7}
    with pytest.raises(ModelError, match="--calib, line 7: message role 'judge'"):
        make_samples(family, None, [line])


def test_an_answer_in_parts(tmp_path):
    family = family_of(paths.GOLDEN / "glm_edge")
    words = []
    for answer in ("yes", [{"type": "text", "text": "yes"}]):
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        [line] = calibration_lines(file_of(tmp_path, {"messages": turns}))
        words.append(answer_of(family, line)[1])
    assert words[0] == words[1] == family.tokenizer.encode("yes")


@pytest.mark.skipif(find_spec("msmodelslim") is None, reason="needs msmodelslim")
def test_model_with_vision_goes_on(tmp_path, monkeypatch):
    """Without --calib, killed before the gate: no layer is done again."""

    def killed(*rest):
        raise KeyboardInterrupt

    command = ["--model", str(LLAVA), "--out", str(tmp_path), "--scheme", "w8a8", "--samples", "99"]
    command += ["--act-method", "1", "--max-kl", "100", "--min-top1", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "pass_gate", killed)
        with pytest.raises(KeyboardInterrupt):
            main(command)
    monkeypatch.setattr(WorkFolder, "save_layer", lambda *rest: pytest.fail("done again"))
    assert main(command) == 0
