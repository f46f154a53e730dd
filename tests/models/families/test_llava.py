"""LLaVA-1.5 against the outputs of the original implementation on a tiny checkpoint (tests/golden/llava)."""

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
from PIL import Image
from safetensors.torch import save_file

from models import family_of
from models.checkpoint import Checkpoint
from models.errors import ModelError
from models.families.llava import Llava
from models.prompt.images import CLIP_MEAN, CLIP_STD
from models.prompt.streaming import StreamDecoder
from models.prompt.tokenizers.sentencepiece_model import SentencePieceTokenizer
from models.side_files import read_json
from runtime import Engine, SamplingParams

GOLDEN = paths.GOLDEN / "llava"
RELEASED = paths.ROOT / "models" / "released"
CASES = ("golden", "golden_seedprompt", "golden_two_images", "golden_text")
GREEDY = SamplingParams(max_tokens=16, temperature=0, repetition_penalty=1.0, ignore_eos=True)
ATOL = 1e-4
FAMILY = family_of(GOLDEN)
TOKENS = json.loads((GOLDEN / "tokens.json").read_text(encoding="utf-8"))
SENTENCEPIECE = SentencePieceTokenizer(GOLDEN / "tokenizer.model", special={"<image>": 480})


def case(name):
    return dict(np.load(GOLDEN / f"{name}.npz"))


def picture(name="image_a.png"):
    return {"type": "image", "image": GOLDEN / name}


def text(words):
    return {"type": "text", "text": words}


def ask(*content):
    return [{"role": "user", "content": list(content)}]


def normalised(pixels):
    return ((pixels / 255 - CLIP_MEAN) / CLIP_STD).transpose(0, 3, 1, 2)


engine = golden_engine(GOLDEN)


def golden_prompt(engine, golden):
    return engine.prompt_from_ids(golden["input_ids"], golden.get("pixel_values"))


@pytest.mark.parametrize("name", CASES)
def test_features_prefill_and_step_logits(engine, name):
    golden = case(name)
    prompt = golden_prompt(engine, golden)
    if "image_features" in golden:
        np.testing.assert_allclose(
            engine.features(prompt), np.concatenate(golden["image_features"]), atol=ATOL
        )
    np.testing.assert_allclose(engine.prefill_logits(prompt), golden["prefill_logits"], atol=ATOL)
    np.testing.assert_allclose(
        engine.score(prompt, golden["greedy_ids"]), golden["step_logits"], atol=ATOL
    )


def test_greedy_tokens_in_one_batch_of_unequal_prompts(engine):
    cases = [case(name) for name in CASES]
    for golden, result in zip(
        cases, engine.generate([golden_prompt(engine, golden) for golden in cases], GREEDY)
    ):
        assert result.token_ids == golden["greedy_ids"].tolist()
        assert result.text == str(golden["greedy_text"])


@pytest.mark.parametrize("with_template", [True, False])
@pytest.mark.parametrize(
    "name, content",
    [
        ("golden", (picture(), text("Describe the picture."))),
        ("golden", (text("Describe the picture."), picture())),  # the template puts pictures first
        ("golden_two_images", (picture(), picture("image_b.png"), text("How many people?"))),
        ("golden_text", (text("Describe the picture."),)),
    ],
)
def test_prompt_text_ids_and_pixels(tmp_path, with_template, name, content):
    golden = case(name)
    family = FAMILY
    if not with_template:
        shutil.copytree(
            GOLDEN,
            tmp_path,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns("chat_template*", "*.npz"),
        )
        family = family_of(tmp_path)
    prompt = family.prompt(ask(*content))
    assert prompt.text == str(golden["prompt"])
    assert prompt.ids.tolist() == golden["input_ids"][0].tolist()
    if "pixel_values" in golden:
        pixels = normalised(np.concatenate(prompt.pixels))
        np.testing.assert_allclose(pixels, golden["pixel_values"], atol=1e-6)


def test_multi_turn_and_system_messages():
    messages = [
        {"role": "system", "content": "Be brief."},
        *ask(picture(), text("What?")),
        {"role": "assistant", "content": "A cat."},
        *ask(text("Colour?")),
    ]
    prompt = FAMILY.prompt(messages, language="en")
    assert (
        prompt.text == "Be brief. USER: <image>\nWhat? ASSISTANT: A cat. USER: Colour? ASSISTANT:"
    )
    assert (
        prompt.ids[0] == 1 and (prompt.ids == 1).sum() == 1 and len(prompt.layout.image_starts) == 1
    )


def test_original_prompt_of_the_deployed_command_has_the_same_ids():
    golden = case("golden_seedprompt")
    ids = np.array(FAMILY.tokenizer.encode(str(golden["prompt"])))
    assert FAMILY._expand(ids, []).tolist() == golden["input_ids"][0].tolist()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "CMYK"])
def test_pictures_of_other_modes(mode):
    rgb = Image.open(GOLDEN / "image_a.png").convert("RGB")
    other = rgb.convert(mode)
    expected = FAMILY.pixels(other.convert("RGB"))
    np.testing.assert_array_equal(FAMILY.pixels(other), expected)
    assert FAMILY.prompt(ask({"type": "image", "image": other}, text("?"))).pixels[0].shape == (
        1,
        56,
        56,
        3,
    )


def test_adjacent_pictures_and_given_starts(engine):
    golden = case("golden_two_images")
    ids = np.concatenate(
        (golden["input_ids"][0][:22], golden["input_ids"][0][23:])
    )  # no line break between them
    assert engine.prompt_from_ids(ids, golden["pixel_values"]).layout.image_starts == (6, 22)
    prompt = engine.prompt_from_ids(ids, golden["pixel_values"], image_starts=[22, 6])
    swapped = engine.prompt_from_ids(ids, golden["pixel_values"][::-1])
    np.testing.assert_allclose(
        engine.prefill_logits(prompt)[-1], engine.prefill_logits(swapped)[-1], atol=ATOL
    )


@pytest.mark.parametrize(
    "ids, pictures, starts, complaint",
    [
        ([1, *[480] * 15, 13], 1, None, "15 <image> tokens and needs 16"),
        ([1, *[480] * 16, 13], 2, None, "16 <image> tokens and needs 32"),
        ([1, *[480] * 16, 13], 0, None, "16 <image> tokens and needs 0"),
        ([1, *[480] * 8, 13, *[480] * 8], 1, None, "must be 16 in a row"),
        ([1, *[480] * 16, 13], 1, [9], "must be 16 in a row"),
    ],
)
def test_pictures_that_do_not_fit_the_ids(ids, pictures, starts, complaint):
    with pytest.raises(ModelError, match=complaint):
        FAMILY.prompt_from_ids(ids, np.zeros((pictures, 3, 56, 56), np.float32), starts)


def test_a_mark_in_the_text_is_text():
    typed = FAMILY.prompt(ask(picture(), text("<image> what?")))
    assert typed.ids.tolist().count(480) == 16
    assert typed.text == "USER: <image>\n<image> what? ASSISTANT:"


@pytest.mark.parametrize("entry", TOKENS, ids=lambda entry: repr(entry["text"]))
@pytest.mark.parametrize(
    "tokenizer", [FAMILY.tokenizer, SENTENCEPIECE], ids=["json", "sentencepiece"]
)
def test_tokenizer_files(tokenizer, entry):
    assert tokenizer.encode(entry["text"]) == entry["ids"]
    assert tokenizer.decode(entry["ids"]) == entry["decoded"]
    assert [tokenizer.token_id(token) for token in ("<image>", "</s>", "no such token")] == [
        480,
        2,
        None,
    ]


def test_sentencepiece_file_serves_a_directory_without_tokenizer_json(tmp_path):
    for name in ("config.json", "tokenizer.model", "tokenizer_config.json", "chat_template.json"):
        shutil.copy(GOLDEN / name, tmp_path)
    prompt = family_of(tmp_path).prompt(ask(picture(), text("Describe the picture.")))
    assert prompt.ids.tolist() == case("golden")["input_ids"][0].tolist()
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ModelError, match="tokenizer.json is missing"):
        family_of(tmp_path).prompt(ask(text("x")))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="not a tokenizer file"):
        family_of(tmp_path).prompt(ask(text("x")))


LETTERS = st.one_of(st.sampled_from("这张图片 \n\tabc😀👩‍👩‍👧é<0>"), st.characters(codec="utf-8"))


@pytest.mark.parametrize(
    "tokenizer", [FAMILY.tokenizer, SENTENCEPIECE], ids=["json", "sentencepiece"]
)
@given(words=st.text(alphabet=LETTERS, max_size=30), ids=st.lists(st.integers(0, 543), max_size=30))
def test_streamed_pieces_are_whole_characters_and_make_the_text(tokenizer, words, ids):
    for sequence in (tokenizer.encode(words), ids):
        decoder = StreamDecoder(tokenizer)
        pieces = [decoder.push(i) for i in sequence]
        assert "\ufffd" in words or not any(piece.endswith("\ufffd") for piece in pieces)
        assert "".join(pieces) + decoder.finish() == tokenizer.decode(sequence)


def test_stop_ids_and_release_sampling(tmp_path):
    assert FAMILY.stop_ids == (2,)
    defaults = FAMILY.sampling(with_image=True)
    assert (defaults.temperature, defaults.max_length) == (0.0, 4096)
    shutil.copytree(
        GOLDEN,
        tmp_path,
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.safetensors", "*.npz"),
    )
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [2, 481]}')
    assert family_of(tmp_path).stop_ids == (2, 481)


def released_config():
    return read_json(RELEASED / "llava-1.5-7b.json")["config"]


def test_names_and_shapes_at_full_size(tmp_path):
    with gzip.open(GOLDEN / "tensors.json.gz") as file:
        expected = json.load(file)["llava-1.5-7b"]
    family = Llava(tmp_path, released_config())
    assert {w.source: list(w.shape) for w in family.weights()} == expected
    assert family.vision.output_shape == (1, 576, 4096) and family.layers == 23


def test_sparse_config_has_the_defaults_of_the_classes(tmp_path):
    config = released_config()
    decoder = Llava(tmp_path, config).decoder
    assert (
        decoder.hidden,
        decoder.layers,
        decoder.heads,
        decoder.kv_heads,
        decoder.head_dim,
        decoder.ffn,
    ) == (4096, 32, 32, 32, 128, 11008)
    assert (decoder.eps, decoder.rope.theta, decoder.max_length) == (1e-5, 10000.0, 4096)
    del config["vision_config"]
    assert Llava(tmp_path, config).vision.output_shape == (1, 576, 4096)


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"mm_vision_tower": "openai/clip"}, "download llava-hf"),
        ({"text_config": {"model_type": "qwen2"}}, "model_type 'qwen2'"),
        (
            {"vision_config": {"model_type": "siglip_vision_model"}},
            "model_type 'siglip_vision_model'",
        ),
        (
            {"text_config": {"rope_scaling": {"type": "linear", "factor": 2.0}}},
            "scales the rotary positions",
        ),
        ({"vision_feature_layer": [-2, -5]}, "takes one number"),
        ({"vision_feature_layer": 25}, "takes one number"),
        ({"vision_feature_select_strategy": "cls"}, "'default', 'full'"),
    ],
)
def test_configs_it_does_not_run(tmp_path, change, complaint):
    (tmp_path / "config.json").write_text(json.dumps(released_config() | change))
    with pytest.raises(ModelError, match=complaint):
        family_of(tmp_path)


# other layouts of the same weights


def in_memory(name):  # state_dict() of transformers 5
    name = name.replace("language_model.lm_head", "lm_head").replace(
        "language_model.model.", "model.language_model."
    )
    name = name.replace("vision_tower.vision_model.", "model.vision_tower.")
    return name.replace("multi_modal_projector", "model.multi_modal_projector")


def saved_by_4_52(name):
    return in_memory(name).replace("model.vision_tower.", "model.vision_tower.vision_model.")


def saved_from_config(name):  # by transformers 5
    return name.replace("vision_tower.vision_model.", "vision_tower.")


@pytest.mark.parametrize("rename", [in_memory, saved_by_4_52, saved_from_config])
@pytest.mark.parametrize("form", ["safetensors", "bin shards"])
def test_other_name_layouts_give_the_same_weights(tmp_path, rename, form):
    released = Checkpoint(GOLDEN)
    tensors = {rename(name): released.tensor(name) for name in released.names}
    tensors["model.language_model.rotary_emb.inv_freq"] = torch.zeros(8)
    tensors[rename("vision_tower.vision_model.embeddings.position_ids")] = torch.arange(17)[None]
    shutil.copy(GOLDEN / "config.json", tmp_path)
    write(tmp_path, tensors, form)
    family = family_of(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    checkpoint.check(family.weights())
    ours = dict(checkpoint.assemble(family.weights()))
    theirs = dict(released.assemble(FAMILY.weights()))
    assert ours.keys() == theirs.keys() and all(
        torch.equal(ours[name], theirs[name]) for name in ours
    )


def write(directory, tensors, form):
    if form == "safetensors":
        save_file(tensors, directory / "model.safetensors")
        return
    names = sorted(tensors)
    files = {
        "pytorch_model-00001-of-00002.bin": names[::2],
        "pytorch_model-00002-of-00002.bin": names[1::2],
    }
    for file, part in files.items():
        torch.save({name: tensors[name] for name in part}, directory / file)
    index = {name: file for file, part in files.items() for name in part}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": index}))


# other sizes, against transformers

SIZES = {
    "grouped heads": {
        "text": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 48}
    },
    "head_dim of its own": {
        "text": {"head_dim": 24, "rope_theta": 5e5, "attention_bias": True, "mlp_bias": True}
    },
    "last layer, class token kept": {
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
    "third layer, other grid": {
        "vision_feature_layer": 3,
        "vision": {"image_size": 60, "patch_size": 20},
    },
    "first layer, other activation": {
        "vision_feature_layer": 1,
        "vision": {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
    },
    "tied, no projector bias": {
        "tie_word_embeddings": True,
        "multimodal_projector_bias": False,
        "projector_hidden_act": "gelu_pytorch_tanh",
    },
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_other_sizes_against_transformers(tmp_path, sizes):
    transformers = pytest.importorskip("transformers")
    original = random_original(transformers, dict(sizes))
    original.save_pretrained(tmp_path)
    engine = Engine(tmp_path, dtype="float32", ops="reference", vision="torch")
    generator = torch.Generator().manual_seed(1)
    side = engine.family.vision.input_shape[1]
    rows = engine.family.vision.rows
    ids = torch.tensor([[1, 7, *[480] * rows, 13, *[480] * rows, 20, 21, 22]])
    pixels = torch.randn(2, 3, side, side, generator=generator)
    with torch.no_grad():
        expected = original(input_ids=ids, pixel_values=pixels).logits[0].numpy()
    prompt = engine.prompt_from_ids(ids.numpy(), pixels.numpy())
    np.testing.assert_allclose(engine.prefill_logits(prompt), expected, atol=ATOL)


def random_original(transformers, sizes):
    text = {
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 256,
        "vocab_size": 500,
    } | sizes.pop("text", {})
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
    } | sizes.pop("vision", {})
    text["tie_word_embeddings"] = sizes.get("tie_word_embeddings", False)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**text),
        image_token_index=480,
        vision_config=transformers.CLIPVisionConfig(**vision),
        **sizes,
    )
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.8 if parameter.dim() == 1 else 0.0, 0.2)
    return model
