"""generation_config.json decides how answers are sampled, as in transformers, or is refused by name."""

import json
import shutil

import paths
import pytest

from models import family_of
from models.errors import ModelError
from models.generation_config import read_generation_config
from runtime import Engine, SamplingParams


def folder_with(tmp_path, family: str, **fields):
    """A copy of a golden checkpoint whose generation_config.json has exactly these fields."""
    copy = tmp_path / family
    shutil.copytree(paths.GOLDEN / family, copy, ignore=shutil.ignore_patterns("golden*", "hf"))
    (copy / "generation_config.json").write_text(json.dumps(fields), encoding="utf-8")
    return copy


@pytest.mark.parametrize("family", ["llava", "glm4", "glm4v", "glm_edge"])
@pytest.mark.parametrize(
    ("fields", "temperature"),
    [
        ({"temperature": 0.9}, 0.0),
        ({"temperature": 0.9, "do_sample": None}, 0.0),
        ({"temperature": 0.9, "do_sample": False}, 0.0),
        ({"temperature": 0.9, "do_sample": True}, 0.9),
    ],
)
def test_without_do_sample_nothing_is_sampled(family, fields, temperature, tmp_path):
    sampling = family_of(folder_with(tmp_path, family, **fields)).sampling(False)
    assert sampling.temperature == temperature


def test_transformers_agrees_about_do_sample(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = folder_with(tmp_path, "llava", temperature=0.9)
    assert not transformers.GenerationConfig.from_pretrained(folder).do_sample


@pytest.mark.parametrize("family", ["visualglm", "glm4", "glm4v", "llava", "glm_edge"])
def test_no_repetition_penalty_that_nobody_named(family):
    golden = family_of(paths.GOLDEN / family)
    assert all(golden.sampling(with_image).repetition_penalty == 1 for with_image in (False, True))


def test_the_releases_chat_keeps_its_repetition_penalty(tmp_path):
    assert family_of(paths.GOLDEN / "glm_edge").chat_sampling(False).repetition_penalty == 1.2
    assert family_of(paths.GOLDEN / "visualglm").chat_sampling(True).repetition_penalty == 1.2
    named = family_of(folder_with(tmp_path, "glm_edge", repetition_penalty=1.1))
    assert named.sampling(False).repetition_penalty == 1.1
    assert named.chat_sampling(False).repetition_penalty == 1.1


def test_max_new_tokens_is_the_default_of_max_tokens(tmp_path):
    folder = folder_with(tmp_path, "glm_edge", max_new_tokens=5)
    engine = Engine(folder, dtype="float32", vision="torch", max_num_seqs=1)
    prompt = engine.prompt([{"role": "user", "content": "hello"}])
    assert engine.settings(prompt, SamplingParams()).max_tokens == 5
    assert engine.settings(prompt, SamplingParams(max_tokens=7)).max_tokens == 7
    [result] = engine.generate([prompt], SamplingParams(ignore_eos=True))
    assert len(result.token_ids) == 5


@pytest.mark.parametrize(
    "field, value",
    [
        ("temperature", "0.8"),
        ("temperature", -1.0),
        ("temperature", [0.8]),
        ("temperature", True),
        ("top_p", 1.5),
        ("top_p", 0),
        ("top_k", 0.5),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", {}),
        ("do_sample", "true"),
        ("max_length", "512"),
        ("max_length", 0),
        ("max_new_tokens", 2.5),
        ("max_new_tokens", 10**400),
        ("eos_token_id", "494"),
        ("eos_token_id", [[494]]),
        ("eos_token_id", -1),
        ("eos_token_id", True),
    ],
)
def test_wrong_values_are_named(field, value, tmp_path):
    folder = folder_with(tmp_path, "glm_edge", **{field: value})
    with pytest.raises(ModelError, match=f"generation_config.json says {field} .* must be"):
        read_generation_config(folder)


def test_whole_floats_are_numbers_and_null_is_absent(tmp_path):
    folder = folder_with(tmp_path, "glm_edge", top_k=50.0, top_p=None, eos_token_id=[3, 4])
    assert read_generation_config(folder) == {
        "do_sample": False,
        "top_k": 50,
        "eos_token_id": (3, 4),
    }
