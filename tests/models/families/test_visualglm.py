"""VisualGLM against the outputs of the original implementation on a tiny checkpoint (tests/golden/visualglm)."""

import json

import numpy as np
import paths
import pytest
import torch
from golden_engine import golden_engine

from models import family_of
from models.checkpoint import Checkpoint
from models.errors import ModelError
from models.families.visualglm import VisualGLM
from runtime import SamplingParams

GOLDEN = paths.GOLDEN / "visualglm"
CASES = ("img", "hist", "text")
GREEDY = SamplingParams(max_tokens=16, temperature=0, repetition_penalty=1.0, ignore_eos=True)
ATOL = 1e-4


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "golden.npz")


engine = golden_engine(GOLDEN)


def golden_prompt(engine, golden, case):
    return engine.prompt_from_ids(
        golden[f"{case}_input_ids"], None if case == "text" else golden["pixel_values"]
    )


def test_features(engine, golden):
    features = engine.features(golden_prompt(engine, golden, "img"))
    np.testing.assert_allclose(features, golden["image_embeds"][0], atol=ATOL)


@pytest.mark.parametrize("case", CASES)
def test_logits_of_prefill_and_of_a_decode_step(engine, golden, case):
    prompt = golden_prompt(engine, golden, case)
    np.testing.assert_allclose(engine.prefill_logits(prompt), golden[f"{case}_logits"], atol=ATOL)
    step = engine.score(prompt, golden[f"{case}_greedy"][:2])[1]
    np.testing.assert_allclose(step, golden[f"{case}_logits_step1"], atol=ATOL)


def test_greedy_tokens_in_one_batch_of_unequal_prompts(engine, golden):
    prompts = [golden_prompt(engine, golden, case) for case in CASES]
    for case, result in zip(CASES, engine.generate(prompts, GREEDY)):
        assert result.token_ids == golden[f"{case}_greedy"].tolist()
        assert result.finish_reason == "length" and result.metrics["output_tokens"] == 16


def test_original_left_padded_batch_equals_ours(engine, golden):
    """The original pads on the left; unpadded prompts must give the same last logits."""
    for ids, mask, logits in zip(
        golden["batch_input_ids"], golden["batch_attention_mask"], golden["batch_logits_last"]
    ):
        last = engine.prefill_logits(engine.prompt_from_ids(ids[mask.astype(bool)]))[-1]
        np.testing.assert_allclose(last, logits, atol=ATOL)


def test_prompt_text_ids_and_pixels(engine, golden):
    texts = json.loads((GOLDEN / "tokenizer_golden.json").read_text(encoding="utf-8"))["prompts"]
    question = [
        {"type": "image", "image": GOLDEN / "image.png"},
        {"type": "text", "text": "描述这张图片。"},
    ]
    prompt = engine.prompt([{"role": "user", "content": question}])
    assert prompt.text == texts["img"] and prompt.ids.tolist() == golden["img_input_ids"].tolist()
    np.testing.assert_array_equal(prompt.pixels[0], golden["nhwc_input"])
    history = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "一只可爱的羊驼"},
        {"role": "user", "content": "这是什么东西"},
    ]
    prompt = engine.prompt(history)
    assert prompt.text == texts["hist"] and prompt.ids.tolist() == golden["hist_input_ids"].tolist()
    prompt = engine.prompt([{"role": "user", "content": "hello world"}])
    assert prompt.text == texts["text"] and prompt.ids.tolist() == golden["text_input_ids"].tolist()


def test_english_wording(engine):
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "so?"},
    ]
    assert engine.prompt(messages, language="en").text == "Q:hi\nA:yes\nQ:so?\nA:"


def test_tokenizer_files(engine):
    cases = json.loads((GOLDEN / "tokenizer_golden.json").read_text(encoding="utf-8"))
    for text, ids in cases["encode"].items():
        assert engine.family.tokenizer.encode(text) == ids
        assert engine.family.tokenizer.decode(ids) == cases["decode"][text]


def test_teacher_forcing_equals_one_long_prefill(engine, golden):
    """Answer tokens after <sop> may also be given as part of the prompt."""
    answer = golden["img_greedy"][:5]
    prompt = golden_prompt(engine, golden, "img")
    longer = engine.prompt_from_ids(
        np.concatenate((golden["img_input_ids"], answer)), golden["pixel_values"]
    )
    np.testing.assert_allclose(
        engine.score(prompt, answer), engine.prefill_logits(longer)[-6:-1], atol=ATOL
    )


def test_streamed_pieces_make_the_text(engine, golden):
    prompt = golden_prompt(engine, golden, "hist")
    assert "".join(engine.stream(prompt, GREEDY)) == engine.generate([prompt], GREEDY)[0].text


@pytest.mark.parametrize(
    "messages, complaint",
    [
        (
            [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}],
            "no system messages",
        ),
        (
            [{"role": "user", "content": "y"}, {"role": "assistant", "content": "z"}],
            "does not end with a user message",
        ),
        (
            [{"role": "user", "content": [{"type": "image", "image": GOLDEN / "image.png"}] * 2}],
            "one picture",
        ),
    ],
)
def test_conversations_it_cannot_have(engine, messages, complaint):
    with pytest.raises(ModelError, match=complaint):
        engine.prompt(messages)


def test_clean_answer(engine):
    assert engine.family.clean(" 你好,世界!ok, no? ") == "你好，世界！ok, no?"


def test_sat_layout_gives_the_same_decoder_weights(tmp_path):
    """The SAT checkpoint of the same model: other names, and rows [q; k; v] instead of per head."""
    hf = Checkpoint(GOLDEN)
    family = VisualGLM(GOLDEN, json.loads((GOLDEN / "config.json").read_text()))
    sat_config = {
        **family.config,
        "eva_args": family.config["eva_config"],
        "qformer_args": family.config["qformer_config"],
    }
    sat = VisualGLM(tmp_path, sat_config)
    module = {
        sat_name(name): sat_rows(name, hf.tensor(name), family.decoder.heads)
        for name in hf.names
        if "inv_freq" not in name
    }
    (tmp_path / "300").mkdir()
    torch.save({"module": module}, tmp_path / "300" / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("300")
    (tmp_path / "model_config.json").write_text(json.dumps(sat_config))
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check(sat.weights())
    ours = dict(hf.assemble(family.weights()))
    theirs = dict(checkpoint.assemble(sat.weights()))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def sat_name(name):
    name = name.replace("image_encoder.", "mixins.eva.model.")
    return "mixins.chatglm-final.lm_head.weight" if name == "lm_head.weight" else name


def sat_rows(name, tensor, heads):
    if name.startswith("transformer.layers") and "query_key_value" in name:
        tensor = tensor.view(heads, 3, -1, *tensor.shape[1:]).transpose(0, 1).reshape(tensor.shape)
    return tensor.contiguous()


@pytest.mark.parametrize("shape", [(3, 224, 224), (1, 3, 224, 224)])
def test_pixels_of_ids_with_and_without_the_axis_of_the_batch(shape):
    golden = dict(np.load(GOLDEN / "golden.npz"))
    pixels = golden["pixel_values"].reshape(shape)
    family = family_of(GOLDEN)
    one = family.prompt_from_ids(golden["img_input_ids"], pixels=[pixels])
    assert np.array_equal(one.pixels[0], family.pixels(golden["pixel_values"]))
