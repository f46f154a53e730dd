"""The same commands for every family: chat once and in conversation, and the comparison with transformers."""

import json
import shutil
import subprocess
import sys
from contextlib import closing
from importlib.util import find_spec

import paths
import pytest

from models.errors import ModelError
from runtime import Engine
from runtime.common.errors import ToolkitError

GOLDEN = paths.GOLDEN
SEEING = {
    "visualglm": "visualglm/image.png",
    "glm4v": "glm4v/image.png",
    "llava": "llava/image_a.png",
    "glm_edge_v": "glm_edge_v/image_a.png",
    "glm_ocr": "glm_ocr/wide.png",
    "glm41v": "glm41v/tall.png",
    "glm46v": "glm46v/uneven.png",
}
ANY_SIZE = ("glm_ocr", "glm41v", "glm46v")
FAMILIES = (
    *("visualglm", "glm4", "glm4_0414", "glm4v", "llava", "glm_edge", "glm_edge_v"),
    *ANY_SIZE,
)
ROOT = paths.ROOT


def command(module, *argv, typed=None):
    run = subprocess.run(
        [sys.executable, "-m", module, *map(str, argv)],
        input=typed,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert "Traceback" not in run.stderr
    return run


def chat(family, *argv, typed=None):
    return command(
        "runtime.chat",
        "--model",
        GOLDEN / family,
        "--vision",
        "torch",
        "--temperature",
        0,
        "--max-tokens",
        4,
        *argv,
        typed=typed,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_one_shot(family):
    picture = ["--image", GOLDEN / SEEING[family]] if family in SEEING else []
    run = chat(family, *picture, "--prompt", "What is this?")
    assert run.returncode == 0 and run.stdout.strip() and "answer 4 tokens" in run.stderr, (
        run.stderr
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_conversation(family):
    picture = f"/image {GOLDEN / SEEING[family]}\n" if family in SEEING else ""
    run = chat(
        family, "--show-prompt", typed=f"{picture}What is this?\nAnd why?\n/clear\n你好\n/stop\n"
    )
    assert run.returncode == 0, run.stderr
    prompts = [line for line in run.stderr.splitlines() if line.startswith("prompt text")]
    assert len(prompts) == 3
    assert (
        "What is this?" in prompts[1]
        and "And why?" in prompts[1]
        and "What is this?" not in prompts[2]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_malformed_messages_are_one_sentence(family):
    with closing(Engine(GOLDEN / family, vision="torch", max_model_len=256)) as engine:
        for messages in (5, [5], [{}], [{"role": "user"}], [{"role": "user", "content": [{}]}]):
            with pytest.raises((ModelError, ToolkitError)):
                engine.prompt(messages)


@pytest.mark.parametrize("family", ["glm4", "glm4_0414", "glm_edge"])
def test_text_models_refuse_pictures(family):
    run = chat(family, "--image", GOLDEN / SEEING["llava"], "--prompt", "x")
    assert run.returncode == 2 and "takes no picture" in run.stderr


@pytest.fixture
def hf_glm4(tmp_path):
    """The -hf layout with the tokenizer of the chatglm layout beside it."""
    shutil.copytree(GOLDEN / "glm4" / "hf", tmp_path / "m")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "glm4" / name, tmp_path / "m")
    return tmp_path / "m"


@pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize("family", ["llava", "glm_edge", "glm4", "glm4_0414", *ANY_SIZE])
def test_transformers_agrees(family, tmp_path, request):
    model = request.getfixturevalue("hf_glm4") if family == "glm4" else GOLDEN / family
    run = command(
        "runtime.compare",
        "--model",
        model,
        "--reference",
        "transformers",
        "--dtype",
        "float32",
        "--vision",
        "torch",
        "--max-tokens",
        6,
        "--out",
        tmp_path / "out",
    )
    assert run.returncode == 0, run.stdout + run.stderr
    stages = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))["stages"]
    assert stages["decode"]["rows"] >= 6 and bool(stages["vision"]["rows"]) == (family in SEEING)


@pytest.mark.parametrize("family", ["visualglm", "glm4v", "glm_edge_v"])
def test_transformers_does_not_know_the_others(family, tmp_path):
    run = command(
        "runtime.compare",
        "--model",
        GOLDEN / family,
        "--reference",
        "transformers",
        "--out",
        tmp_path / "out",
    )
    assert run.returncode == 2 and "leave --reference out" in run.stderr
