"""The lines that a quantisation measures on and is judged by: what tells them apart."""

import json
from importlib.util import find_spec

import paths
import pytest
from PIL import Image

from models import family_of
from quant import pipeline
from quant.__main__ import main
from quant.options import CalibrationOptions
from quant.samples import choose_lines, lines_key, read_lines
from quant.work_folder import WorkFolder

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
        keys.append(lines_key(read_lines(str(tmp_path / "calib.jsonl"))))
    assert keys[0] == keys[1] != keys[2]


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
