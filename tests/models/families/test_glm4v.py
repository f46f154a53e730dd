"""GLM-4V-9B: outputs of the original implementation on a tiny checkpoint (tests/golden/glm4v), other sizes against
plain torch, picture and prompt rules, and the names and shapes of the release.
"""

import json
import math

import numpy as np
import paths
import plain_glm4 as plain
import pytest
import torch
from golden_engine import golden_engine
from PIL import Image

from models import RELEASED
from models.errors import ModelError
from models.families.glm4v import Glm4V
from models.prompt.images import CLIP_MEAN, CLIP_STD
from runtime import Engine, SamplingParams

GOLDEN = paths.GOLDEN / "glm4v"
GREEDY = SamplingParams(max_tokens=16, temperature=0, repetition_penalty=1.0, ignore_eos=True)
ATOL = 1e-4
BOI, PAD, EOI = 301, 291, 302


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "golden.npz")


engine = golden_engine(GOLDEN, (("reference", "torch"), ("cpu", "onnx")))


@pytest.fixture(scope="module")
def family():
    return Glm4V(GOLDEN, json.loads((GOLDEN / "config.json").read_text()))


def question(picture, text="What is this?"):
    return [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}],
        }
    ]


# numbers of the original implementation


def test_features_logits_tokens(engine, golden):
    prompt = engine.prompt_from_ids(golden["input_ids"][0], golden["pixel_values"])
    np.testing.assert_allclose(engine.features(prompt), golden["vision_features"][0], atol=ATOL)
    np.testing.assert_allclose(
        engine.prefill_logits(prompt), golden["prefill_logits"][0], atol=ATOL
    )
    np.testing.assert_allclose(
        engine.score(prompt, golden["greedy_tokens"][0]), golden["step_logits"][0], atol=ATOL
    )
    assert engine.generate([prompt], GREEDY)[0].token_ids == golden["greedy_tokens"][0].tolist()


def test_text_alone_and_beside_a_picture_in_one_batch(engine, golden):
    text = engine.prompt_from_ids(golden["text_only_input_ids"][0])
    np.testing.assert_allclose(
        engine.prefill_logits(text), golden["text_only_prefill_logits"][0], atol=ATOL
    )
    answers = engine.generate(
        [engine.prompt_from_ids(golden["input_ids"][0], golden["pixel_values"]), text], GREEDY
    )
    assert answers[0].token_ids == golden["greedy_tokens"][0].tolist()
    assert answers[1].token_ids == golden["text_only_greedy_tokens"][0].tolist()


def test_positions_share_one_place_for_all_patches(family, golden):
    layout = family.prompt_from_ids(golden["input_ids"][0], golden["pixel_values"]).layout
    assert layout.positions[:, 0].tolist() == golden["expanded_position_ids"][0].tolist()
    assert layout.next_position == (golden["input_ids"].shape[1],) and layout.position_step == (1,)


# pictures and prompts


def test_pixels_are_those_of_the_release(family, golden):
    """The release gets RGB by PIL's `convert`, squashes with PIL's bicubic filter, and does not rotate."""
    picture = Image.open(GOLDEN / "image.png")
    assert np.array_equal(np.asarray(picture.convert("RGB")), golden["image_u8"])
    normalised = (family.pixels(picture) / 255 - np.array(CLIP_MEAN)) / np.array(CLIP_STD)
    np.testing.assert_allclose(normalised.transpose(0, 3, 1, 2), golden["pixel_values"], atol=1e-5)
    for other in (
        picture.convert("RGBA"),
        picture.convert("L"),
        picture.convert("P"),
        rotated(picture),
    ):
        squashed = other.convert("RGB").resize((56, 56), Image.Resampling.BICUBIC)
        assert np.array_equal(family.pixels(other)[0], np.asarray(squashed, np.float32))


def rotated(picture):
    picture.getexif()[0x0112] = 6
    return picture


def test_arrays_raw_and_normalised_are_the_same_picture(family, golden):
    raw = family.pixels(GOLDEN / "image.png")
    for pixels in (raw, golden["pixel_values"]):
        assert np.array_equal(family.prompt_from_ids(golden["input_ids"][0], pixels).pixels[0], raw)
    with pytest.raises(ModelError, match="pixels are"):
        family.prompt_from_ids(golden["input_ids"][0], golden["pixel_values"][:, :, :-1])


def test_prompt_with_picture(family):
    prompt = family.prompt(question(GOLDEN / "image.png"))
    encode = family.tokenizer.encode
    token_id = family.tokenizer.token_id
    head = [token_id("[gMASK]"), token_id("<sop>"), token_id("<|user|>"), *encode("\n")]
    assert prompt.ids.tolist() == [
        *head,
        BOI,
        *[PAD] * 4,
        EOI,
        *encode("What is this?"),
        token_id("<|assistant|>"),
    ]
    assert prompt.layout.image_starts == (len(head),)
    assert prompt.text == (
        "[gMASK]<sop><|user|>\n<|begin_of_image|><|endoftext|><|end_of_image|>What is this?"
        "<|assistant|>"
    )
    released = [{"role": "user", "image": GOLDEN / "image.png", "content": "What is this?"}]
    assert family.prompt(released).ids.tolist() == prompt.ids.tolist()


def test_picture_after_a_system_turn_and_in_a_later_turn(family):
    messages = [
        {"role": "system", "content": "Be brief."},
        *question(GOLDEN / "image.png"),
        {"role": "assistant", "content": "A cat."},
        {"role": "user", "content": "Sure?"},
    ]
    prompt = family.prompt(messages)
    (start,) = prompt.layout.image_starts
    assert prompt.ids[start] == BOI and prompt.ids[start + 5] == EOI
    late = family.prompt(
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hi"},
            *question(GOLDEN / "image.png"),
        ]
    )
    assert late.layout.image_starts[0] > start - len("Be brief.") and late.layout.next_position == (
        len(late.ids) - 3,
    )
    typed = family.prompt([{"role": "user", "content": "<|begin_of_image|>"}])
    assert BOI not in typed.ids and not typed.layout.image_starts


def test_one_picture_per_conversation(family, golden):
    two = question(GOLDEN / "image.png")[0]["content"][:1] * 2 + [{"type": "text", "text": "x"}]
    with pytest.raises(ModelError, match="one picture per conversation, 2 given"):
        family.prompt([{"role": "user", "content": two}])
    with pytest.raises(ModelError, match="one picture per conversation"):
        family.prompt_from_ids(golden["input_ids"][0], np.repeat(golden["pixel_values"], 2, 0))


def test_ids_that_do_not_fit_the_picture(family, golden):
    for ids in ([1, 2, 3], [BOI, PAD, PAD, EOI], [BOI, PAD, EOI, BOI, PAD, EOI]):
        with pytest.raises(ModelError, match="must hold 301, one placeholder, 302 once"):
            family.prompt_from_ids(ids, golden["pixel_values"])
    without = family.prompt_from_ids(golden["input_ids"][0])
    assert len(without.ids) == golden["input_ids"].shape[1] and not without.layout.image_starts


# other sizes, against plain torch


def config_of(vision, **changes):
    tower = {
        "num_hidden_layers": 2,
        "hidden_size": 24,
        "num_heads": 2,
        "intermediate_size": 40,
        "patch_size": 14,
        "image_size": 56,
        "layer_norm_eps": 1e-6,
        "scaling_factor": 8,
        "hidden_act": "gelu",
        "in_channels": 3,
        **vision,
    }
    tower["num_positions"] = (tower["image_size"] // tower["patch_size"]) ** 2 + 1
    return plain.chatglm_config(vision_config=tower, rope_ratio=1, **changes)


SIZES = {
    "bigger-grid": (
        config_of({"image_size": 84, "num_hidden_layers": 1, "num_heads": 3, "scaling_factor": 1}),
        "sharded",
    ),
    "odd-grid": (
        config_of({"image_size": 70, "scaling_factor": 3}, multi_query_group_num=1),
        "bin",
    ),
    "small-patches": (
        config_of(
            {"image_size": 48, "patch_size": 8, "layer_norm_eps": 1e-3},
            num_attention_heads=6,
            multi_query_group_num=3,
        ),
        "sharded bin",
    ),
}


@pytest.mark.parametrize("name", SIZES)
def test_other_sizes_and_files(name, tmp_path):
    config, storage = SIZES[name]
    tensors = plain.random_checkpoint(tmp_path, config, Glm4V, storage)
    engine = Engine(tmp_path, dtype="float32", ops="cpu", vision="torch", block_size=8)
    side = config["vision_config"]["image_size"]
    pixels = torch.randn((1, 3, side, side), generator=torch.Generator().manual_seed(1))
    ids = np.concatenate((plain.rng_ids(7), [80, 1, 81], plain.rng_ids(9, seed=1)))
    prompt = engine.prompt_from_ids(ids, pixels.numpy())
    rows = plain.picture_rows(tensors, config, pixels)
    np.testing.assert_allclose(engine.features(prompt), rows.numpy(), atol=ATOL)

    def expected(answer):
        embedding = tensors["transformer.embedding.word_embeddings.weight"]
        text = embedding[torch.tensor([*ids, *answer])]
        places = [*range(8), *[8] * (len(rows) - 2), *range(9, len(text))]
        x = torch.cat((text[:7], rows, text[10:]))
        return plain.text_logits(
            tensors, config, plain.sizes_of(config), x, torch.tensor(places)
        ).numpy()

    np.testing.assert_allclose(engine.prefill_logits(prompt), expected([]), atol=ATOL)
    answer = engine.generate([prompt], GREEDY)[0].token_ids
    assert answer == expected(answer)[-17:-1].argmax(-1).tolist()


def test_positions_that_do_not_fit_the_picture(tmp_path):
    config = config_of({})
    config["vision_config"]["num_positions"] = 26
    with pytest.raises(ModelError, match="num_positions 26.*16 patches"):
        Glm4V(tmp_path, config)


# the release's names and shapes

W, H, FFN = 1792, 4096, 13696
VISION = {
    "boi": (1, 1, H),
    "eoi": (1, 1, H),
    "patch_embedding.cls_embedding": (1, W),
    "patch_embedding.proj.weight": (W, 3, 14, 14),
    "patch_embedding.proj.bias": (W,),
    "patch_embedding.position_embedding.weight": (6401, W),
    "conv.weight": (H, W, 2, 2),
    "conv.bias": (H,),
    "linear_proj.linear_proj.weight": (H, H),
    "linear_proj.norm1.weight": (H,),
    "linear_proj.norm1.bias": (H,),
    "linear_proj.gate_proj.weight": (FFN, H),
    "linear_proj.dense_h_to_4h.weight": (FFN, H),
    "linear_proj.dense_4h_to_h.weight": (H, FFN),
}
BLOCK = {
    "input_layernorm.weight": (W,),
    "input_layernorm.bias": (W,),
    "attention.query_key_value.weight": (3 * W, W),
    "attention.query_key_value.bias": (3 * W,),
    "attention.dense.weight": (W, W),
    "attention.dense.bias": (W,),
    "mlp.fc1.weight": (15360, W),
    "mlp.fc1.bias": (15360,),
    "mlp.fc2.weight": (W, 15360),
    "mlp.fc2.bias": (W,),
    "post_attention_layernorm.weight": (W,),
    "post_attention_layernorm.bias": (W,),
}


@pytest.fixture(scope="module")
def released():
    return Glm4V(
        "nowhere", json.loads((RELEASED / "glm-4v-9b.json").read_text(encoding="utf-8"))["config"]
    )


def test_names_and_shapes_of_the_release(released):
    ours = {w.source: w.shape for w in released.weights()}
    expected = {
        f"transformer.layers.{i}.{name}": shape for i in range(63) for name, shape in BLOCK.items()
    } | VISION
    root = "transformer.vision."
    assert {
        name.removeprefix(root): shape for name, shape in ours.items() if name.startswith(root)
    } == expected
    assert (
        len(ours) == 1054 and sum(map(math.prod, ours.values())) == 13_906_320_896 + 32
    )  # inv_freq: dropped


def test_table_fills_the_encoder_of_the_release(released):
    assert released.vision.input_shape == (1, 1120, 1120, 3) and released.vision.output_shape == (
        1,
        1602,
        4096,
    )
    with torch.device("meta"):
        wanted = {
            "vision." + name: tuple(p.shape)
            for name, p in released.vision_encoder().state_dict().items()
        }
    found = {}
    for weight in released.weights():
        for part in (part for part in weight.parts if part.target.in_vision):
            piece = torch.empty(weight.shape, device="meta")[slice(*(part.take or (None,)))]
            found[str(part.target)] = tuple(
                (part.transform(piece) if part.transform else piece).shape
            )
    assert found == wanted
