"""Pictures of GLM-OCR, GLM-4.1V and GLM-4.6V-Flash against the original classes' outputs."""

import json
import shutil
from functools import cache

import numpy as np
import paths
import PIL
import pytest
from golden_engine import golden_engine
from PIL import Image

from models import family_of
from models.errors import ModelError
from models.network.patch_geometry import position_rows
from models.prompt.patches import PatchRules, fitted_size
from runtime import SamplingParams

FAMILIES = ("glm_ocr", "glm41v", "glm46v")
PICTURES = ("wide", "tall", "tiny", "uneven")
FEATURES = 2e-5
LOGITS = 5e-4
RULES = PatchRules(12544, 9633792, (0.5,) * 3, (0.5,) * 3)
ROW = 1176


@cache
def cases_of(name) -> dict:
    return json.loads((paths.GOLDEN / name / "cases.json").read_text(encoding="utf-8"))


@cache
def arrays_of(name):
    return np.load(paths.GOLDEN / name / "golden.npz")


def case_of(name, case) -> dict:
    return next(each for each in cases_of(name)["cases"] if each["name"] == case)


def rows_and_grid(name, picture) -> dict:
    """As the release's processor gives it."""
    arrays = arrays_of(name)
    stem = picture.removesuffix(".png")
    return {
        "pixel_values": arrays[f"{stem}__pixel_values"],
        "grid_thw": arrays[f"{stem}__grid_thw"][0],
    }


def messages_of(name, case) -> list[dict]:
    """With the pictures' files in their places."""
    found = case_of(name, case)
    files = iter(found["images"])
    messages = []
    for message in found["messages"]:
        parts = []
        for part in message["content"]:
            if part["type"] == "image":
                part = {"type": "image", "image": paths.GOLDEN / name / next(files)}
            parts.append(part)
        messages.append({"role": message["role"], "content": parts})
    return messages


def prompt_of(engine, name, case):
    pictures = [rows_and_grid(name, file) for file in case_of(name, case)["images"]]
    return engine.prompt_from_ids(arrays_of(name)[f"{case}__input_ids"], pictures)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("picture", PICTURES)
def test_rows_and_grid_of_a_picture(name, picture):
    family = family_of(paths.GOLDEN / name)
    found = family.pixels(paths.GOLDEN / name / f"{picture}.png")
    expected = rows_and_grid(name, picture)
    assert [1, *found.grid] == expected["grid_thw"].tolist()
    if int(PIL.__version__.split(".")[0]) < 13:
        pytest.skip(f"Pillow {PIL.__version__} resizes to other values than 13, which made these")
    np.testing.assert_allclose(found.rows, expected["pixel_values"], atol=1e-5)


@pytest.mark.parametrize("name", ["glm41v", "glm46v"])
@pytest.mark.parametrize("picture", ["wide", "uneven"])
def test_the_position_map_at_every_patch(name, picture):
    family = family_of(paths.GOLDEN / name)
    grid = tuple(rows_and_grid(name, picture)["grid_thw"][1:])
    rows = position_rows(family.position_map, grid)
    np.testing.assert_allclose(rows, arrays_of(name)[f"{picture}__position_rows"], atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_sizes(name):
    family = family_of(paths.GOLDEN / name)
    golden = cases_of(name)
    for case in golden["resize_cases"]:
        width, height = fitted_size(case["width"], case["height"], family.patch_rules)
        assert [1, height // 14, width // 14] == case["grid_thw"], case
    for case in golden["refused_sizes"]:
        with pytest.raises(ModelError, match="200 times"):
            fitted_size(case["width"], case["height"], family.patch_rules)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_in_the_words_of_the_template(name):
    family = family_of(paths.GOLDEN / name)
    for case in cases_of(name)["cases"]:
        if case["template_kwargs"]:
            continue
        prompt = family.prompt(messages_of(name, case["name"]))
        assert prompt.text == case["prompt"]
        assert prompt.ids.tolist() == arrays_of(name)[f"{case['name']}__input_ids"].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_the_default_template_has_places_for_pictures(name, tmp_path):
    shutil.copytree(paths.GOLDEN / name, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    prompt = family_of(tmp_path / "model").prompt(messages_of(name, "two_images"))
    expected = arrays_of(name)["two_images__input_ids"]
    assert prompt.ids[: len(expected) - 2].tolist() == expected[:-2].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_stop_ids_are_the_files(name):
    assert list(family_of(paths.GOLDEN / name).stop_ids) == cases_of(name)["eos_ids"]


@pytest.mark.parametrize(
    "rows, grid, complaint",
    [
        (np.zeros((24, ROW), np.float32), [1, 4, 8], "4 x 8 patches, pixel_values has 24 rows"),
        (np.zeros((21, ROW), np.float32), [1, 3, 7], "even number of patches"),
        (np.zeros((24, ROW), np.float32), [2, 4, 6], r"grid_thw is \[2, 4, 6\]"),
        (np.zeros((24, ROW), np.float32), [1, 4.0, 6.0], "grid_thw is"),
        (np.zeros((24, 1175), np.float32), [1, 4, 6], r"expected float \[N, 1176\]"),
        (np.zeros((24, ROW), np.int64), [1, 4, 6], "int64"),
    ],
)
def test_rows_and_grids_that_do_not_fit(rows, grid, complaint):
    family = family_of(paths.GOLDEN / "glm_ocr")
    with pytest.raises(ModelError, match=complaint):
        family.pixels({"pixel_values": rows, "grid_thw": grid})


def test_something_else_as_a_picture():
    with pytest.raises(ModelError, match="pixel_values"):
        family_of(paths.GOLDEN / "glm_ocr").prompt_from_ids([1, 2], [{"rows": 3}])


@pytest.mark.parametrize("size", [(1, 1), (30000, 151), (27, 300), (1, 40)])
def test_odd_sizes_become_whole_blocks(size):
    width, height = fitted_size(*size, RULES)
    assert width % 28 == 0 and height % 28 == 0 and width > 0 and height > 0
    assert 2 * width * height <= RULES.most


@pytest.mark.parametrize(
    "field, value, complaint",
    [
        ("size", {"shortest_edge": 5, "longest_edge": 2}, "two numbers above 0"),
        ("size", {"shortest_edge": "a", "longest_edge": 2}, "says size.shortest_edge .a."),
        ("patch_size", 16, "patch_size 16"),
        ("merge_size", 1, "merge_size 1"),
        ("do_resize", False, "do_resize False"),
        ("resample", 2, "resample 2"),
        ("image_processor_type", "CLIPImageProcessor", "CLIPImageProcessor"),
    ],
)
def test_settings_that_are_not_computed(tmp_path, field, value, complaint):
    shutil.copytree(paths.GOLDEN / "glm_ocr", tmp_path / "model")
    file = tmp_path / "model" / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ModelError, match=complaint):
        family_of(tmp_path / "model")


def test_mean_and_std_of_the_file_are_computed(tmp_path):
    shutil.copytree(paths.GOLDEN / "glm_ocr", tmp_path / "model")
    file = tmp_path / "model" / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"image_mean": [0, 0, 0], "image_std": [1, 1, 1]}))
    white = family_of(tmp_path / "model").pixels(Image.new("RGB", (56, 56), "white"))
    np.testing.assert_array_equal(white.rows, 1.0)


@pytest.mark.parametrize("name", ["glm4v_moe", "glm4v_moe_text"])
def test_a_mixture_of_experts_is_refused_by_name(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": name, "vision_config": {}}))
    with pytest.raises(ModelError, match="GLM-4.5V"):
        family_of(tmp_path)


ocr = golden_engine(paths.GOLDEN / "glm_ocr")
glm41v = golden_engine(paths.GOLDEN / "glm41v")
glm46v = golden_engine(paths.GOLDEN / "glm46v", (("cpu", "torch"),))


def check_family(engine, name):
    """Features and logits of every case, and the cases decoded together."""
    arrays = arrays_of(name)
    cases = [case["name"] for case in cases_of(name)["cases"]]
    for case in cases:
        prompt = prompt_of(engine, name, case)
        stems = [file.removesuffix(".png") for file in case_of(name, case)["images"]]
        if stems:
            expected = np.concatenate([arrays[f"{stem}__image_features"] for stem in stems])
            np.testing.assert_allclose(engine.features(prompt), expected, atol=FEATURES)
        logits = engine.score(prompt, arrays[f"{case}__greedy"])
        np.testing.assert_allclose(logits, arrays[f"{case}__step_logits"], atol=LOGITS)
    params = SamplingParams(max_tokens=24, temperature=0, repetition_penalty=1.0, ignore_eos=True)
    results = engine.generate([prompt_of(engine, name, case) for case in cases], params)
    for case, result in zip(cases, results):
        assert result.token_ids == arrays[f"{case}__greedy"].tolist(), case


def test_glm_ocr(ocr):
    check_family(ocr, "glm_ocr")


def test_glm41v(glm41v):
    check_family(glm41v, "glm41v")


def test_glm46v(glm46v):
    check_family(glm46v, "glm46v")


@pytest.mark.parametrize("name", FAMILIES)
def test_an_image_token_that_a_user_types_is_text(name):
    """Although the token is not special in the file of GLM-OCR, and so one id in any other text."""
    family = family_of(paths.GOLDEN / name)
    token = family.placeholder[1]
    text = {"type": "text", "text": "a<|image|>b<|image|><|begin_of_image|>"}
    prompt = family.prompt([{"role": "user", "content": [text]}])
    assert token not in prompt.ids and "a<|image|>b<|image|><|begin_of_image|>" in prompt.text
    assert "a<|image|>b" in family.tokenizer.decode(prompt.ids)
    image = {"type": "image", "image": paths.GOLDEN / name / "wide.png"}
    prompt = family.prompt([{"role": "user", "content": [text, image]}])
    assert np.count_nonzero(prompt.ids == token) == 10
