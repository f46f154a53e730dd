"""The language part of GLM-OCR, GLM-4.1V and GLM-4.6V-Flash against the original classes' outputs.

The picture features of the goldens take the place of a vision encoder's.
"""

import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import cpu_kernels
import numpy as np
import pytest
import torch
from golden_cases import golden
from vl_text_golden import FAMILIES, float_weights, prompt_of

from models import family_of
from models.errors import ModelError
from models.families.vl_text import picture_layout, text_decoder, text_fields
from models.family import Family
from models.network.decoder import Decoder
from models.prompt.tokenizers.json_file import MissingTokenizer
from models.side_files import read_json
from runtime import Engine, SamplingParams
from runtime.ascend import socs
from runtime.ascend.socs import A2, P310
from runtime.engine.kv_cache import KVCache
from runtime.engine.request import Request, Settings
from runtime.engine.runner import Runner
from runtime.engine.scheduler import Scheduler
from runtime.engine.sequence import Chunk, Sequence
from runtime.ops import choose
from runtime.ops.cpu.native_library import missing
from runtime.ops.npu.ops import NpuOps

NPU_SETS = {
    "910B aclnn": (A2, socs.A2_ACLNN),
    "910B atb": (A2, socs.A2_ATB),
    "310P": (P310, socs.P310_ATB),
}
BLOCK = 16


def cases_of(*names):
    return [(name, case) for name in names for case in golden(name).cases]


@cache
def decoder_of(name: str, ops: str) -> Decoder:
    operators = choose(ops, "cpu")
    config = text_decoder(text_fields(golden(name).config))
    return Decoder(config, float_weights(name, operators), operators)


def runner_of(name: str, ops: str, blocks: int = 64) -> Runner:
    decoder = decoder_of(name, ops)
    cache = KVCache(decoder.config, blocks, BLOCK, torch.float32, "cpu", decoder.ops)
    return Runner(decoder, cache)


@pytest.fixture(params=["reference", "cpu"])
def ops(request):
    return request.param


def start(runner, prompt) -> Sequence:
    return Sequence(prompt, runner.cache.allocate(len(prompt.ids) + 24))


@pytest.mark.parametrize("name, case", cases_of(*FAMILIES))
def test_positions_and_where_the_answer_goes_on(name, case):
    told = golden(name)
    layout = prompt_of(name, case).layout
    assert np.array_equal(layout.positions.T, told.of(case, "position_ids"))
    first = len(layout.positions) + told.of(case, "rope_delta").item()
    assert layout.next_position == (first,) * 3 and layout.position_step == (1, 1, 1)


@pytest.mark.parametrize("name, case", cases_of(*FAMILIES))
def test_logits_of_the_prompt_and_of_24_steps(name, case, ops):
    told = golden(name)
    runner = runner_of(name, ops)
    sequence = start(runner, prompt_of(name, case))
    logits = runner.prefill(sequence, told.features(case), all_logits=True)
    if told.has(case, "prefill_all"):
        np.testing.assert_allclose(logits, told.of(case, "prefill_all"), atol=told.atol)
    steps = [logits[-1:]]
    for token in told.greedy(case)[:-1]:
        steps.append(runner.decode([sequence], [token]))
    steps = torch.cat(steps)
    np.testing.assert_allclose(steps, told.of(case, "step_logits"), atol=told.atol)
    assert steps.argmax(1).tolist() == told.greedy(case)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_prompt_in_chunks_and_two_sequences_together(name, ops):
    """A chunk may end inside a picture; each sequence counts on from its own picture."""
    told = golden(name)
    runner = runner_of(name, ops)
    cases = ("img_wide", "two_images")
    sequences = [start(runner, prompt_of(name, case)) for case in cases]
    for sequence, case in zip(sequences, cases):
        length = len(sequence.prompt.ids)
        for end in (*range(7, length, 7), length):
            logits = runner.run([Chunk(sequence, end, told.features(case))])
        np.testing.assert_allclose(logits[0], told.of(case, "prefill_last"), atol=told.atol)
    for step in range(23):
        logits = runner.decode(sequences, [told.greedy(case)[step] for case in cases])
        expected = [told.of(case, "step_logits")[step + 1] for case in cases]
        np.testing.assert_allclose(logits, np.stack(expected), atol=told.atol)


@pytest.mark.skipif(bool(missing()), reason="needs the CPU's own kernels")
def test_all_layers_in_one_call_of_the_kernels():
    """In bfloat16, behind a picture: norms behind the branches and three-part angles."""
    told = golden("glm_ocr")
    engine = Engine(told.directory, dtype="bfloat16", vision="torch")
    pictures = [
        {"pixel_values": told.of(each, "pixel_values"), "grid_thw": told.of(each, "grid_thw")[0]}
        for each in told.pictures("img_wide")
    ]
    prompt = engine.prompt_from_ids(told.ids("img_wide"), pictures)
    found = torch.from_numpy(engine.score(prompt, told.greedy("img_wide")))
    expected = torch.from_numpy(told.of("img_wide", "step_logits"))
    assert torch.nn.functional.cosine_similarity(found, expected).min() > 0.999
    assert engine._runner.decoder.ops._native_layers


@pytest.mark.parametrize("soc, kernels", NPU_SETS.values(), ids=NPU_SETS)
@pytest.mark.parametrize("name", FAMILIES)
def test_operators_of_the_npu(name, soc, kernels):
    """torch_npu's schemas, with plain arithmetic behind them: the rotation takes our angles."""
    told = golden(name)
    config = decoder_of(name, "reference").config
    cpu_kernels.stand_in_for(soc)
    with cpu_kernels.in_place():
        small = replace(kernels, block_sizes=(BLOCK,))
        operators = NpuOps(replace(soc, dtypes=("float32",)), "cpu", small)
        decoder = Decoder(config, float_weights(name, operators), operators)
        cache = KVCache(config, 16, BLOCK, torch.float32, "cpu", operators)
        runner = Runner(decoder, cache)
        sequences = [start(runner, prompt_of(name, case)) for case in ("img_wide", "img_tall")]
        for sequence, case in zip(sequences, ("img_wide", "img_tall")):
            logits = runner.prefill(sequence, told.features(case), all_logits=True)
            np.testing.assert_allclose(logits, told.of(case, "prefill_all"), atol=told.atol)
        tokens = [told.greedy(case)[0] for case in ("img_wide", "img_tall")]
        logits = runner.decode(sequences, tokens)
        for row, case in zip(logits, ("img_wide", "img_tall")):
            np.testing.assert_allclose(row, told.of(case, "step_logits")[1], atol=told.atol)


class NoText(Family):
    """What a request asks its family for; answers are ids alone."""

    tokenizer = MissingTokenizer(Path())
    stop_ids = ()


SETTINGS = Settings(0.0, 1.0, 0, 1.0, 0.0, 0.0, 0.0, max_tokens=24)


@pytest.mark.parametrize("name", FAMILIES)
def test_preempted_and_reused_prompts_count_on_from_their_pictures(name):
    """Cases twice through a cache that holds little more than the longest one: chunks of 24 tokens,
    answers that give way and begin anew, prompts whose beginning is found in the cache."""
    told = golden(name)
    cases = ("two_turns_images", "img_tall", "short", "img_wide", "two_images")
    longest = max(len(told.ids(case)) for case in cases)
    runner = runner_of(name, "reference", blocks=-(-(longest + 24) // BLOCK) + 1)
    features = {}
    requests = []
    for case in (*cases, *cases):
        prompt = prompt_of(name, case)
        features[id(prompt)] = told.features(case)
        requests.append((case, Request(NoText(Path(), {}), prompt, SamplingParams(), SETTINGS)))
    scheduler = Scheduler(runner, lambda prompt: (features[id(prompt)], 0.0), 6, 24)
    for _, request in requests:
        scheduler.add(request)
    preempted = 0
    while scheduler.busy:
        plan = scheduler.schedule()
        preempted += len(plan.preempted)
        scheduler.postprocess(plan, *scheduler.run(plan))
    assert preempted and any(request.result.metrics["cached_tokens"] for _, request in requests)
    for case, request in requests:
        assert request.result.token_ids == told.greedy(case), case


@pytest.mark.parametrize(
    "file, directory",
    [
        ("config_flat.json", "glm41v"),
        ("config_saved5.json", "glm41v"),
        ("config_glm46v.json", "glm46v"),
    ],
)
def test_other_spellings_of_the_same_settings(file, directory):
    told = golden(directory)
    other = read_json(told.directory / file)
    assert text_decoder(text_fields(other)) == text_decoder(text_fields(told.config))


def test_text_config_before_the_top_level():
    """Some files repeat the text fields, and the repeated ones are not those of the weights."""
    config = golden("glm41v").config
    repeated = {"hidden_size": 64, "rope_theta": 1.0, "rope_scaling": None, "num_hidden_layers": 9}
    assert text_decoder(text_fields(config | repeated)) == text_decoder(text_fields(config))


@pytest.mark.parametrize("file", ["config.json", "config_flat.json"])
def test_ids_that_end_an_answer_stand_with_the_text_fields(tmp_path, file):
    shutil.copy(golden("glm41v").directory / file, tmp_path / "config.json")
    assert family_of(tmp_path).stop_ids == (388, 395, 397, 407)


def text_with(**rope):
    text = text_fields(golden("glm_ocr").config)
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
