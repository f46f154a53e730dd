"""The language part of GLM-OCR, GLM-4.1V and GLM-4.6V-Flash against the original classes' outputs.

The picture features of the goldens take the place of a vision encoder's.
"""

import json
from functools import cache

import numpy as np
import paths
import pytest
import torch

from models.checkpoint import Checkpoint
from models.errors import ModelError
from models.families.vl_text import picture_layout, text_decoder, text_fields, text_rows
from models.family import Prompt
from models.network.decoder import Decoder
from models.side_files import read_json
from runtime.engine.kv_cache import KVCache
from runtime.engine.runner import Runner
from runtime.engine.sequence import Chunk, Sequence
from runtime.ops import choose

FAMILIES = ("glm_ocr", "glm41v", "glm46v")
ATOL = 5e-4
BLOCK = 16


class Golden:
    """One directory of tests/golden: its cases, and its arrays by case and field."""

    def __init__(self, name: str):
        self.directory = paths.GOLDEN / name
        self.config = read_json(self.directory / "config.json")
        cases = json.loads((self.directory / "cases.json").read_text(encoding="utf-8"))["cases"]
        self.cases = {case["name"]: case for case in cases}
        self.arrays = np.load(self.directory / "golden.npz")

    def of(self, case: str, field: str) -> np.ndarray:
        return self.arrays[f"{case}__{field}"]

    def pictures(self, case: str) -> list[str]:
        return [name.removesuffix(".png") for name in self.cases[case]["images"]]

    def features(self, case: str) -> list[np.ndarray]:
        return [self.of(picture, "image_features") for picture in self.pictures(case)]

    def prompt(self, case: str) -> Prompt:
        ids = self.of(case, "input_ids").astype(np.int64)
        grids = [self.of(picture, "grid_thw")[0, 1:] // 2 for picture in self.pictures(case)]
        layout = picture_layout(ids, self.config["image_token_id"], grids)
        return Prompt(ids, [], layout)


@cache
def golden_of(name: str) -> Golden:
    return Golden(name)


def cases_of(*names):
    return [(name, case) for name in names for case in golden_of(name).cases]


@cache
def runner_of(name: str, ops: str) -> Runner:
    """The decoder in float32, over a cache with room for the longest case."""
    golden = golden_of(name)
    config = text_decoder(text_fields(golden.config))
    checkpoint = Checkpoint(golden.directory)
    rows = list(text_rows(config, checkpoint.shapes, qkv_bias=name != "glm_ocr"))
    language = {row.source for row in rows}
    assert all("visual." in other for other in set(checkpoint.names) - language)
    operators = choose(ops, "cpu")
    weights = {}
    for target, tensor in checkpoint.assemble(rows):
        tensor = tensor.float()
        packs = tensor.dim() == 2 and target != "embed.weight"
        weights[target] = operators.pack(tensor) if packs else tensor
    cache = KVCache(config, 64, BLOCK, torch.float32, "cpu", operators)
    return Runner(Decoder(config, weights, operators), cache)


@pytest.fixture(params=["reference", "cpu"])
def ops(request):
    return request.param


def start(runner, prompt) -> Sequence:
    return Sequence(prompt, runner.cache.allocate(len(prompt.ids) + 24))


@pytest.mark.parametrize("name, case", cases_of(*FAMILIES))
def test_positions_and_where_the_answer_goes_on(name, case):
    golden = golden_of(name)
    layout = golden.prompt(case).layout
    assert np.array_equal(layout.positions.T, golden.of(case, "position_ids"))
    first = len(layout.positions) + golden.of(case, "rope_delta").item()
    assert layout.next_position == (first,) * 3 and layout.position_step == (1, 1, 1)


@pytest.mark.parametrize("name, case", cases_of(*FAMILIES))
def test_logits_of_the_prompt_and_of_24_steps(name, case, ops):
    golden = golden_of(name)
    runner = runner_of(name, ops)
    sequence = start(runner, golden.prompt(case))
    try:
        logits = runner.prefill(sequence, golden.features(case), all_logits=True)
        if f"{case}__prefill_all" in golden.arrays:
            np.testing.assert_allclose(logits, golden.of(case, "prefill_all"), atol=ATOL)
        steps = [logits[-1:]]
        for token in golden.of(case, "greedy")[:-1].tolist():
            steps.append(runner.decode([sequence], [token]))
        steps = torch.cat(steps)
        np.testing.assert_allclose(steps, golden.of(case, "step_logits"), atol=ATOL)
        assert steps.argmax(1).tolist() == golden.of(case, "greedy").tolist()
    finally:
        runner.cache.release(sequence.block_table)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_in_chunks_and_two_sequences_together(name, ops):
    """A chunk may end inside a picture; each sequence counts on from its own picture."""
    golden = golden_of(name)
    runner = runner_of(name, ops)
    cases = ("img_wide", "two_images")
    sequences = [start(runner, golden.prompt(case)) for case in cases]
    try:
        for sequence, case in zip(sequences, cases):
            length = len(sequence.prompt.ids)
            for end in (*range(7, length, 7), length):
                logits = runner.run([Chunk(sequence, end, golden.features(case))])
            np.testing.assert_allclose(logits[0], golden.of(case, "prefill_last"), atol=ATOL)
        for step in range(23):
            tokens = [int(golden.of(case, "greedy")[step]) for case in cases]
            logits = runner.decode(sequences, tokens)
            expected = [golden.of(case, "step_logits")[step + 1] for case in cases]
            np.testing.assert_allclose(logits, np.stack(expected), atol=ATOL)
    finally:
        for sequence in sequences:
            runner.cache.release(sequence.block_table)


@pytest.mark.parametrize(
    "file, directory",
    [
        ("config_flat.json", "glm41v"),
        ("config_saved5.json", "glm41v"),
        ("config_glm46v.json", "glm46v"),
    ],
)
def test_other_spellings_of_the_same_settings(file, directory):
    golden = golden_of(directory)
    other = read_json(golden.directory / file)
    assert text_decoder(text_fields(other)) == text_decoder(text_fields(golden.config))


def test_text_config_before_the_top_level():
    """Some files repeat the text fields, and the repeated ones are not those of the weights."""
    config = golden_of("glm41v").config
    repeated = {"hidden_size": 64, "rope_theta": 1.0, "rope_scaling": None, "num_hidden_layers": 9}
    assert text_decoder(text_fields(config | repeated)) == text_decoder(text_fields(config))


def text_with(**rope):
    text = text_fields(golden_of("glm_ocr").config)
    return text | {"rope_parameters": text["rope_parameters"] | rope}


@pytest.mark.parametrize(
    "sections, complaint",
    [
        ([4, 6, 7], r"into \[4, 6, 7\], which must be 3 numbers that add up to 16"),
        ([8, 8], r"into \[8, 8\], which must be 3 numbers"),
    ],
)
def test_sections_that_do_not_fit(sections, complaint):
    with pytest.raises(ModelError, match=complaint):
        text_decoder(text_with(mrope_section=sections))


def test_no_sections():
    text = text_with()
    del text["rope_parameters"]["mrope_section"]
    with pytest.raises(ModelError, match="no mrope_section"):
        text_decoder(text)


@pytest.mark.parametrize(
    "ids, grids, complaint",
    [
        ([1, 9, 9, 9, 2], [(2, 2)], "3 picture tokens .id 9., but its 1 pictures have 4 rows"),
        ([1, 9, 9, 9, 9, 2], [], "4 picture tokens .id 9., but its 0 pictures"),
        ([9, 9, 1, 9, 9], [(2, 2)], "picture of 2 x 2 must be 4 in a row"),
    ],
)
def test_pictures_that_do_not_fit_the_ids(ids, grids, complaint):
    with pytest.raises(ModelError, match=complaint):
        picture_layout(np.array(ids), 9, grids)
