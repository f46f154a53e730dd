"""GLM-Edge chat and V against the outputs of the original implementations on tiny checkpoints (tests/golden/glm_edge*).

The V goldens' adapter, and the adapter below, were written from its description; the rest is the originals'.
"""

import gzip
import json
import shutil

import numpy as np
import paths
import pytest
import torch
from golden_engine import golden_engine
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.nn import functional as F

from models import family_of
from models.checkpoint import Checkpoint
from models.errors import ModelError
from models.families.glm_edge import GlmEdge
from models.prompt.streaming import StreamDecoder
from models.side_files import read_json
from runtime import Engine, SamplingParams

CHAT, EYES = (paths.GOLDEN / name for name in ("glm_edge", "glm_edge_v"))
RELEASED = paths.ROOT / "models" / "released"
CHAT_CASES = ("golden", "golden_multiturn")
V_CASES = {
    "golden": "image_a.png",
    "golden_textfirst_smallimage": "image_b.png",
    "golden_text": None,
}
GREEDY = SamplingParams(max_tokens=16, temperature=0, repetition_penalty=1.0, ignore_eos=True)
ATOL = 1e-4
BOI = 504


def case(directory, name):
    return dict(np.load(directory / f"{name}.npz"))


def messages_of(golden, picture):
    messages = json.loads(str(golden["messages_json"]))
    for part in (p for m in messages if isinstance(m["content"], list) for p in m["content"]):
        if part["type"] == "image":
            part["image"] = EYES / picture
    return messages


@pytest.fixture(scope="module", params=["reference", "cpu"])
def chat(request):
    return Engine(CHAT, dtype="float32", ops=request.param)


eyes = golden_engine(EYES)


def check_logits(engine, golden):
    prompt = engine.prompt_from_ids(golden["input_ids"], golden.get("pixel_values"))
    if "image_features" in golden:
        np.testing.assert_allclose(engine.features(prompt), golden["image_features"][0], atol=ATOL)
    np.testing.assert_allclose(engine.prefill_logits(prompt), golden["prefill_logits"], atol=ATOL)
    np.testing.assert_allclose(
        engine.score(prompt, golden["greedy_ids"]), golden["step_logits"], atol=ATOL
    )


def check_batch(engine, cases):
    prompts = [
        engine.prompt_from_ids(golden["input_ids"], golden.get("pixel_values")) for golden in cases
    ]
    for golden, result in zip(cases, engine.generate(prompts, GREEDY)):
        assert result.token_ids == golden["greedy_ids"].tolist()


@pytest.mark.parametrize("name", CHAT_CASES)
def test_chat_prefill_and_step_logits(chat, name):
    check_logits(chat, case(CHAT, name))


@pytest.mark.parametrize("name", V_CASES)
def test_v_features_prefill_and_step_logits(eyes, name):
    check_logits(eyes, case(EYES, name))


def test_greedy_tokens_in_one_batch_of_unequal_prompts(chat, eyes):
    check_batch(chat, [case(CHAT, name) for name in CHAT_CASES])
    check_batch(eyes, [case(EYES, name) for name in V_CASES])


def family(directory, tmp_path, with_template):
    if with_template:
        return family_of(directory)
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.npz"))
    settings = read_json(tmp_path / "tokenizer_config.json")
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    return family_of(tmp_path)


@pytest.mark.parametrize("with_template", [True, False])
@pytest.mark.parametrize("name", CHAT_CASES)
def test_chat_prompt_text_and_ids(tmp_path, with_template, name):
    golden = case(CHAT, name)
    prompt = family(CHAT, tmp_path, with_template).prompt(messages_of(golden, None), language="zh")
    assert (
        prompt.text == str(golden["prompt"])
        and prompt.ids.tolist() == golden["input_ids"][0].tolist()
    )


@pytest.mark.parametrize("with_template", [True, False])
@pytest.mark.parametrize("name", V_CASES)
def test_v_prompt_text_ids_and_pixels(tmp_path, with_template, name):
    golden = case(EYES, name)
    prompt = family(EYES, tmp_path, with_template).prompt(messages_of(golden, V_CASES[name]))
    assert (
        prompt.text == str(golden["prompt"])
        and prompt.ids.tolist() == golden["input_ids"][0].tolist()
    )
    for pixels in prompt.pixels:
        normalised = ((pixels / 255 - 0.5) / 0.5).transpose(0, 3, 1, 2)
        np.testing.assert_allclose(normalised, golden["pixel_values"][0, 0], atol=1e-6)


def test_v_conversation_of_several_turns():
    content = [
        {"type": "image", "image": EYES / "image_a.png"},
        {"type": "text", "text": "这是什么？"},
    ]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "猫"},
        {"role": "user", "content": "ok?"},
    ]
    prompt = family_of(EYES).prompt(messages)
    marks = "<|begin_of_image|>" * 6
    assert (
        prompt.text == f"<|user|>\n{marks}这是什么？<|assistant|>\n猫<|user|>\nok?<|assistant|>\n"
    )
    assert prompt.layout.image_starts == (2,) and len(prompt.pixels) == 1


def test_what_the_families_refuse():
    picture = {"type": "image", "image": EYES / "image_a.png"}
    question = {"role": "user", "content": [picture, {"type": "text", "text": "?"}]}
    with pytest.raises(ModelError, match="text model and takes no picture"):
        family_of(CHAT).prompt([question])
    with pytest.raises(ModelError, match="one picture per conversation, 2 given"):
        family_of(EYES).prompt([{"role": "user", "content": [picture, picture]}])
    with pytest.raises(ModelError, match="no system messages"):
        family_of(EYES).prompt([{"role": "system", "content": "Be brief."}, question])
    with pytest.raises(ModelError, match="no place for tools"):
        family_of(CHAT).prompt([{"role": "user", "content": "?"}], tools=[{"type": "function"}])


@pytest.mark.parametrize(
    "ids, pictures, complaint",
    [
        ([501, *[BOI] * 5, 502], 1, "5 <|begin_of_image|> tokens and needs 6"),
        ([501, *[BOI] * 6, 502], 0, "6 <|begin_of_image|> tokens and needs 0"),
        ([501, *[BOI] * 3, 1, *[BOI] * 3], 1, "must be 6 in a row"),
        ([501, *[BOI] * 12, 502], 2, "one picture per conversation"),
    ],
)
def test_pictures_that_do_not_fit_the_ids(ids, pictures, complaint):
    pixels = np.full((pictures, 1, 1, 3, 56, 56), 0.5, np.float32)
    with pytest.raises(ModelError, match=complaint.replace("|", r"\|")):
        family_of(EYES).prompt_from_ids(ids, pixels)


def test_the_zero_picture_of_a_text_prompt_is_left_out():
    golden = case(EYES, "golden_text")
    assert (
        family_of(EYES).prompt_from_ids(golden["input_ids"], np.zeros((1, 1, 1, 3, 56, 56))).pixels
        == []
    )


@pytest.mark.parametrize("directory", [CHAT, EYES], ids=["chat", "v"])
def test_tokenizer_files(directory):
    tokenizer = family_of(directory).tokenizer
    for entry in json.loads((directory / "tokens.json").read_text(encoding="utf-8")):
        assert tokenizer.encode(entry["text"]) == entry["ids"]
        assert tokenizer.decode(entry["ids"]) == entry["decoded"]


LETTERS = st.one_of(st.sampled_from("你好，图片 \n\tabc😀👩‍👩‍👧é"), st.characters(codec="utf-8"))
TOKENIZER = family_of(CHAT).tokenizer


@given(words=st.text(alphabet=LETTERS, max_size=30), ids=st.lists(st.integers(0, 511), max_size=30))
def test_streamed_pieces_are_whole_characters_and_make_the_text(words, ids):
    for sequence in (TOKENIZER.encode(words), ids):
        decoder = StreamDecoder(TOKENIZER)
        pieces = [decoder.push(i) for i in sequence]
        assert "\ufffd" in words or not any(piece.endswith("\ufffd") for piece in pieces)
        assert "".join(pieces) + decoder.finish() == TOKENIZER.decode(sequence)


def test_stop_ids_sampling_and_names(tmp_path):
    text = family_of(CHAT)
    v = family_of(EYES)
    assert (text.name, v.name) == ("glm-edge", "glm-edge-v") and "vision_config" in v.rule
    assert text.stop_ids == v.stop_ids == (494, 501, 503)
    assert (
        text.chat_sampling(False).repetition_penalty == 1.2
        and text.sampling(False).temperature == 0.8
    )
    config = {k: x for k, x in read_json(CHAT / "config.json").items() if k != "eos_token_id"}
    shutil.copy(CHAT / "tokenizer.json", tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert family_of(tmp_path).stop_ids == (494, 501, 503)  # by the names of the tokens
    assert family_of(tmp_path).sampling(False).temperature == 0.6


@pytest.mark.parametrize(
    "release", ["glm-edge-1.5b-chat", "glm-edge-4b-chat", "glm-edge-v-2b", "glm-edge-v-5b"]
)
def test_names_and_shapes_at_full_size(tmp_path, release):
    with gzip.open(CHAT / "tensors.json.gz") as file:
        expected = json.load(file)[release]
    config = read_json(RELEASED / f"{release}.json")["config"]
    assert GlmEdge.matches(config)
    model = GlmEdge(tmp_path, config)
    assert {w.source: list(w.shape) for w in model.weights()} == expected
    if model.vision:
        assert model.vision.output_shape == (1, 578, config["hidden_size"])


def test_other_layouts_of_the_same_weights(tmp_path):
    """Another prefix, begin and end rows with fewer axes, no pooling head."""
    released = Checkpoint(EYES)
    model = family_of(EYES)
    tensors = {
        name.replace("model.vision.vit.model.", "vision.vit."): released.tensor(name)
        for name in released.names
        if ".head." not in name
    }
    for mark in ("boi", "eoi"):
        tensors[f"model.vision.adapter.{mark}"] = (
            tensors[f"model.vision.adapter.{mark}"].reshape(-1).clone()
        )
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(EYES / "config.json", tmp_path)
    checkpoint = Checkpoint(tmp_path)
    other = family_of(tmp_path)
    checkpoint.check(other.weights())
    ours = dict(checkpoint.assemble(other.weights()))
    theirs = dict(released.assemble(model.weights()))
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


@pytest.mark.parametrize("stored", ["equal", "different", "left out"])
def test_tied_output_matrix(tmp_path, stored):
    """Without a stored one the embeddings serve; a stored one is used."""
    released = Checkpoint(CHAT)
    tensors = {name: released.tensor(name) for name in released.names}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * (
        1 if stored == "equal" else 2
    )
    expected = (
        tensors["model.embed_tokens.weight"]
        if stored == "left out"
        else tensors["lm_head.weight"].clone()
    )
    if stored == "left out":
        del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(CHAT / "config.json", tmp_path)
    checkpoint = Checkpoint(tmp_path)
    model = family_of(tmp_path)
    checkpoint.check(model.weights())
    assert torch.equal(dict(checkpoint.assemble(model.weights()))["lm_head.weight"], expected)


def test_an_output_matrix_that_should_be_there(tmp_path):
    released = Checkpoint(CHAT)
    save_file(
        {n: released.tensor(n) for n in released.names if n != "lm_head.weight"},
        tmp_path / "model.safetensors",
    )
    config = read_json(CHAT / "config.json") | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="lm_head.weight"):
        Checkpoint(tmp_path).check(family_of(tmp_path).weights())


# other sizes, against transformers' GLM and SigLIP

SIZES = {
    "as released": {},
    "half rotated, heads of their own size": {
        "head_dim": 16,
        "partial_rotary_factor": 0.5,
        "num_hidden_layers": 2,
    },
    "one kv head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True, "rope_theta": 5e5},
    "no groups": {"num_key_value_heads": 4, "rms_norm_eps": 1e-3},
}


def decoder_config(**sizes):
    return {
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 16,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 256,
        "partial_rotary_factor": 1.0,
        "attention_bias": False,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "tie_word_embeddings": False,
        "pad_token_id": 494,
        "eos_token_id": [494, 501, 503],
    } | sizes


def random_glm(transformers, config):
    config = dict(config)
    rope = {key: config.pop(key) for key in ("rope_theta", "partial_rotary_factor")}
    settings = transformers.GlmConfig(**config, rope_parameters=rope | {"rope_type": "default"})
    settings._attn_implementation = "eager"
    torch.manual_seed(0)
    return randomise(transformers.GlmForCausalLM(settings).eval())


def randomise(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.8 if parameter.dim() == 1 else 0.0, 0.2)
    return model


@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_other_decoder_sizes_against_transformers(tmp_path, sizes):
    transformers = pytest.importorskip("transformers", minversion="5")  # for rope_parameters
    original = random_glm(transformers, decoder_config(**sizes))
    original.save_pretrained(tmp_path, max_shard_size="40KB")
    engine = Engine(tmp_path, dtype="float32", ops="reference", block_size=16)
    ids = torch.randint(0, 500, (1, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = original(input_ids=ids).logits[0].numpy()
    np.testing.assert_allclose(
        engine.prefill_logits(engine.prompt_from_ids(ids.numpy())), expected, atol=ATOL
    )


@pytest.mark.parametrize(
    "tower",
    [
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
        },
        {
            "hidden_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 50,
            "patch_size": 10,
        },
    ],
    ids=["even grid", "odd grid"],
)
def test_other_towers(tmp_path, tower):
    transformers = pytest.importorskip("transformers")
    tower = tower | {"intermediate_size": 40}
    settings = transformers.SiglipVisionConfig(**tower)
    settings._attn_implementation = "eager"
    torch.manual_seed(2)
    siglip = randomise(transformers.SiglipVisionModel(settings).eval())
    config = decoder_config(
        boi_token_id=504, eoi_token_id=505, vision_config=tower, model_type="glm"
    )
    glm = random_glm(transformers, decoder_config())
    adapter = random_adapter(tower["hidden_size"], 64, 80)
    state = {
        "model.vision.vit.model.vision_model." + name.removeprefix("vision_model."): x
        for name, x in siglip.state_dict().items()
    }
    state |= {f"model.vision.adapter.{name}": x for name, x in adapter.items()} | glm.state_dict()
    save_file({name: x.contiguous() for name, x in state.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    engine = Engine(tmp_path, dtype="float32", ops="reference", vision="torch")
    side = tower["image_size"]
    pixels = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(3)) - 0.5
    with torch.no_grad():
        patches = siglip(pixels).last_hidden_state
        features = run_adapter(adapter, patches)
    ids = [501, *[504] * len(features), 7, 8]
    ours = engine.features(engine.prompt_from_ids(ids, pixels.numpy()))
    np.testing.assert_allclose(ours, features.numpy(), atol=ATOL)


def random_adapter(width, hidden, inner):
    shapes = {
        "conv.weight": (hidden, width, 2, 2),
        "conv.bias": (hidden,),
        "linear_proj.linear_proj.weight": (hidden, hidden),
        "linear_proj.norm1.weight": (hidden,),
        "linear_proj.norm1.bias": (hidden,),
        "linear_proj.gate_proj.weight": (inner, hidden),
        "linear_proj.dense_h_to_4h.weight": (inner, hidden),
        "linear_proj.dense_4h_to_h.weight": (hidden, inner),
        "boi": (1, 1, hidden),
        "eoi": (1, 1, hidden),
    }
    return {name: torch.randn(shape) * 0.2 for name, shape in shapes.items()}


def run_adapter(w, patches):
    """[1, g * g, width] -> [rows, hidden]"""
    side = int(patches.shape[1] ** 0.5)
    grid = patches.reshape(side, side, -1).permute(2, 0, 1)[None]
    x = F.conv2d(grid, w["conv.weight"], w["conv.bias"], stride=2)[0].flatten(1).T
    x = x @ w["linear_proj.linear_proj.weight"].T
    x = F.gelu(
        F.layer_norm(x, x.shape[-1:], w["linear_proj.norm1.weight"], w["linear_proj.norm1.bias"])
    )
    gated = F.silu(x @ w["linear_proj.gate_proj.weight"].T) * (
        x @ w["linear_proj.dense_h_to_4h.weight"].T
    )
    return torch.cat((w["boi"][0], gated @ w["linear_proj.dense_4h_to_h.weight"].T, w["eoi"][0]))
