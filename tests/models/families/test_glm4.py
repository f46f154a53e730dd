"""GLM-4-9B-chat, both layouts: outputs of the original implementations on tiny checkpoints (tests/golden/glm4), other
sizes against plain torch, prompts and tokenizers, and the names and shapes of the release.
"""

import itertools
import json
import math
import os
import shutil

import numpy as np
import paths
import plain_glm4 as plain
import pytest
import torch

from models import RELEASED, family_of
from models.errors import ModelError
from models.families.glm4 import SPECIAL, Glm4, template_pieces
from models.prompt.chat_template import ChatTemplate
from models.prompt.streaming import StreamDecoder
from models.prompt.tokenizers.json_file import JsonTokenizer
from models.prompt.tokenizers.ranks import TiktokenTokenizer
from models.synthetic.releases import glm4_files
from runtime import Engine, SamplingParams

GOLDEN = paths.GOLDEN / "glm4"
TOKENS = json.loads((GOLDEN / "tokenizer_golden.json").read_text(encoding="utf-8"))
GREEDY = SamplingParams(max_tokens=16, temperature=0, repetition_penalty=1.0, ignore_eos=True)
ATOL = 1e-4
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "查天气"}}


@pytest.fixture(
    scope="module", params=itertools.product(("chatglm", "hf"), ("reference", "cpu")), ids="-".join
)
def case(request):
    """(engine, golden arrays)"""
    layout, ops = request.param
    directory = GOLDEN if layout == "chatglm" else GOLDEN / "hf"
    return Engine(directory, dtype="float32", ops=ops), np.load(directory / "golden.npz")


@pytest.fixture(scope="module")
def family():
    return family_of(GOLDEN)


# numbers of the original implementations


def test_prefill_logits_and_greedy_tokens(case):
    engine, golden = case
    prompt = engine.prompt_from_ids(golden["input_ids"][0])
    np.testing.assert_allclose(
        engine.prefill_logits(prompt), golden["prefill_logits"][0], atol=ATOL
    )
    assert engine.generate([prompt], GREEDY)[0].token_ids == golden["greedy_tokens"][0].tolist()


def test_logits_of_every_decode_step(case):
    engine, golden = case
    if "step_logits" in golden:
        scored = engine.score(
            engine.prompt_from_ids(golden["input_ids"][0]), golden["greedy_tokens"][0]
        )
        np.testing.assert_allclose(scored, golden["step_logits"][0], atol=ATOL)


def test_prompt_longer_than_several_cache_blocks(case):
    engine, golden = case
    prompt = engine.prompt_from_ids(golden["long_input_ids"][0])
    np.testing.assert_allclose(
        engine.prefill_logits(prompt)[-1], golden["long_last_logits"][0], atol=ATOL
    )
    if "long_greedy_tokens" in golden:
        assert (
            engine.generate([prompt], GREEDY)[0].token_ids
            == golden["long_greedy_tokens"][0].tolist()
        )


def test_left_padded_batch_of_the_original_equals_our_unpadded_one(case):
    engine, golden = case
    if "batch_input_ids" not in golden:
        return
    masks = golden["batch_attention_mask"].astype(bool)
    prompts = [
        engine.prompt_from_ids(ids[mask]) for ids, mask in zip(golden["batch_input_ids"], masks)
    ]
    for prompt, logits in zip(prompts, golden["batch_last_logits"]):
        np.testing.assert_allclose(engine.prefill_logits(prompt)[-1], logits, atol=ATOL)
    answers = [result.token_ids for result in engine.generate(prompts, GREEDY)]
    assert answers == golden["batch_greedy_tokens"].tolist()


# other sizes, against plain torch

SIZES = {
    "one-layer": plain.chatglm_config(
        num_layers=1, num_attention_heads=6, multi_query_group_num=3, rope_ratio=1
    ),
    "one-head-per-group": plain.chatglm_config(
        num_attention_heads=5, multi_query_group_num=5, kv_channels=12
    ),
    "one-group-no-bias": plain.chatglm_config(
        multi_query_group_num=1, add_qkv_bias=False, rope_ratio=10000
    ),
    "hf-new-rope": plain.hf_config(
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        rope_theta=None,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 70000.0,
            "partial_rotary_factor": 0.25,
        },
    ),
    "hf-whole-rope-tied": plain.hf_config(
        partial_rotary_factor=1.0, num_key_value_heads=1, tie_word_embeddings=True
    ),
}


@pytest.mark.parametrize(
    "name, storage", zip(SIZES, itertools.cycle(["one", "sharded", "bin", "sharded bin"]))
)
def test_other_sizes_and_files(name, storage, tmp_path):
    config = SIZES[name]
    tensors = plain.random_checkpoint(tmp_path, config, Glm4, storage)
    if config.get("tie_word_embeddings"):
        del tensors["lm_head.weight"]
        plain.save(tmp_path, tensors, storage)
    engine = Engine(tmp_path, dtype="float32", ops="cpu", block_size=8)
    ids = plain.rng_ids(37)
    sizes = plain.sizes_of(config)
    embedding = plain.chatglm_names(tensors, config)["transformer.embedding.word_embeddings.weight"]

    def expected(ids):
        return plain.text_logits(
            tensors, config, sizes, embedding[torch.tensor(ids)], torch.arange(len(ids))
        ).numpy()

    prompt = engine.prompt_from_ids(ids)
    np.testing.assert_allclose(engine.prefill_logits(prompt), expected(ids), atol=ATOL)
    answer = engine.generate([prompt, engine.prompt_from_ids(ids[:5])], GREEDY)[0].token_ids
    whole = expected(np.concatenate((ids, answer)))
    assert answer == whole[len(ids) - 1 : -1].argmax(-1).tolist()


def test_networks_no_release_has_are_refused(tmp_path):
    changes = (
        {"rmsnorm": False},
        {"multi_query_attention": False},
        {"add_bias_linear": True},
        {"pre_seq_len": 128},
    )
    for change in changes:
        with pytest.raises(ModelError, match=next(iter(change))):
            Glm4(tmp_path, plain.chatglm_config(**change))
    with pytest.raises(ModelError, match="rotary"):
        Glm4(tmp_path, plain.hf_config(rope_parameters={"rope_type": "yarn"}))


# prompts


def test_prompt_header_and_content_are_encoded_separately(family):
    encode = family.tokenizer.encode
    token_id = family.tokenizer.token_id
    prompt = family.prompt(
        [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "\n你好"},
            {"role": "assistant", "content": "<|user|>"},
            {"role": "user", "content": "bye"},
        ]
    )
    pieces = [
        "[gMASK]",
        "<sop>",
        "<|system|>",
        ("\n",),
        ("Be kind.",),
        "<|user|>",
        ("\n",),
        ("\n你好",),
        "<|assistant|>",
        ("\n",),
        ("<|user|>",),
        "<|user|>",
        ("\n",),
        ("bye",),
        "<|assistant|>",
    ]
    ids = [[token_id(piece)] if isinstance(piece, str) else encode(piece[0]) for piece in pieces]
    assert prompt.ids.tolist() == sum(ids, [])
    assert prompt.text == (
        "[gMASK]<sop><|system|>\nBe kind.<|user|>\n\n你好<|assistant|>\n<|user|>"
        "<|user|>\nbye<|assistant|>"
    )
    assert prompt.ids.tolist().count(token_id("<|user|>")) == 2
    assert (
        prompt.layout.positions[:, 0].tolist() == list(range(len(prompt.ids))) and not prompt.pixels
    )


def test_tools_stand_in_a_system_turn_of_their_own(family):
    question = {"role": "user", "content": "北京天气"}
    text = family.prompt([question], tools=[WEATHER]).text
    assert text.startswith("[gMASK]<sop><|system|>\n你是一个名为 GLM-4 的人工智能助手。")
    assert (
        '\n\n## get_weather\n\n{\n    "name": "get_weather",\n    "description": "查天气"\n}\n'
        in text
    )
    assert text.endswith("请使用 Json 格式表示调用的参数。<|user|>\n北京天气<|assistant|>")
    in_message = [{"role": "system", "content": "", "tools": [WEATHER]}, question]
    assert family.prompt(in_message).text == text
    called = [
        question,
        {"role": "assistant", "metadata": "get_weather", "content": '{"city": "北京"}'},
        {"role": "observation", "content": "20 度"},
    ]
    assert family.prompt(called).text == (
        '[gMASK]<sop><|user|>\n北京天气<|assistant|>get_weather\n{"city": "北京"}'
        "<|observation|>\n20 度<|assistant|>"
    )


@pytest.mark.parametrize(
    "messages, complaint",
    [
        ([], "does not end with a user message"),
        (
            [{"role": "user", "content": "y"}, {"role": "assistant", "content": "z"}],
            "does not end with a user message",
        ),
        ([{"role": "boss", "content": "y"}], "use one of system, user, assistant, observation"),
        ([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}], "takes no picture"),
        (
            [{"role": "user", "content": "y", "tools": [{"type": "python"}]}],
            "'python' is not known",
        ),
    ],
)
def test_conversations_it_cannot_have(family, messages, complaint):
    with pytest.raises(ModelError, match=complaint):
        family.prompt(messages)


def test_template_of_the_directory(tmp_path):
    source = (
        "[gMASK]<sop>{% for item in messages %}{% if item['tools'] is defined %}<|system|>\nTools:"
        "{% for tool in item['tools'] %} {{ tool['function'] | tojson }}{% endfor %}{% endif %}"
        "{% if item['content'] %}<|{{ item['role'] }}|>{{ item['metadata'] }}\n{{ item['content'] }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    for file in ("config.json", "tokenizer.model"):
        shutil.copy(GOLDEN / file, tmp_path)
    settings = json.loads((GOLDEN / "tokenizer_config.json").read_text()) | {
        "chat_template": source
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    family = family_of(tmp_path)
    text = family.prompt([{"role": "user", "content": "<sop>\n天气"}], tools=[WEATHER]).text
    assert text == (
        '[gMASK]<sop><|system|>\nTools: {"name": "get_weather", "description": "查天气"}'
        "<|user|>\n<sop>\n天气<|assistant|>"
    )
    ids = family.prompt([{"role": "user", "content": "<sop>"}]).ids.tolist()
    assert ids.count(family.tokenizer.token_id("<sop>")) == 1, "what the user types is text"


def test_template_joins_header_and_content_as_transformers_does():
    message = {"role": "user", "content": "\nx <|user|>", "metadata": ""}
    template = ChatTemplate(
        "[gMASK]<sop>{% for m in messages %}<|user|>\n{{ m.content }}{% endfor %}<|assistant|>"
    )
    assert template_pieces(template, [message]) == [
        "[gMASK]",
        "<sop>",
        "<|user|>",
        "\n\nx <|user|>",
        "<|assistant|>",
    ]


def test_stop_ids_are_the_union_of_all_files_and_the_family(tmp_path, family):
    assert family.stop_ids == (291, 298, 300)
    for file in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(GOLDEN / file, tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 291}')
    config = {**family.config, "eos_token_id": 7}
    assert Glm4(tmp_path, config).stop_ids == (7, 291, 298, 300)


def test_sampling_and_answers(family):
    sampling = family.sampling(False)
    assert (sampling.temperature, sampling.top_p, sampling.max_length) == (0.8, 0.8, 512)
    assert family.clean("\n你好 [[训练时间]]\n") == "你好 2023年"
    assert family.unstable_tail("今天是[[训练") == 4 and family.unstable_tail("a[0]") == 0


def test_ids_run_without_a_tokenizer_text_does_not():
    engine = Engine(GOLDEN / "hf", dtype="float32")
    assert engine.generate([engine.prompt_from_ids([1, 2, 3])], GREEDY)[0].text == ""
    with pytest.raises(ModelError, match="no \\[gMASK\\]; copy"):
        engine.prompt([{"role": "user", "content": "hi"}])
    with pytest.raises(ModelError, match="takes no picture"):
        engine.prompt_from_ids([1, 2, 3], np.zeros((1, 3, 8, 8), np.float32))


# tokenizers


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def tokenizer(request, tmp_path_factory):
    if request.param == "tokenizer.model":
        return TiktokenTokenizer(GOLDEN / request.param, SPECIAL)
    path = tmp_path_factory.mktemp("tokenizer") / request.param
    path.write_bytes(glm4_files({}, full=False, json_file=True)[0]["tokenizer.json"])
    return JsonTokenizer(path, plain=True)


TEXTS = (
    "hello world",
    "你好，世界！ℕ½",
    "😀👨‍👩‍👧 family",
    "\n\n  two\t\r\nlines ",
    "<|user|>[gMASK]",
    "naïve café العربية",
)


def test_text_survives_and_special_looking_text_is_plain(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and max(ids) < 291
    assert [tokenizer.token_id(piece) for piece in SPECIAL] == list(range(291, 305))


def test_stream_never_splits_a_character(tokenizer):
    generator = np.random.default_rng(0)
    answers = [tokenizer.encode(text) for text in TEXTS] + [
        generator.integers(0, 305, 60).tolist() for _ in range(50)
    ]
    for ids in answers:
        stream = StreamDecoder(tokenizer)
        pieces = [stream.push(token_id) for token_id in ids] + [stream.finish()]
        assert "".join(pieces) == tokenizer.decode(ids)
        if "\ufffd" not in tokenizer.decode(ids):
            assert "\ufffd" not in "".join(pieces) and all(
                piece.encode() for piece in pieces if piece
            )


def test_special_ids_follow_the_ranks_without_a_tokenizer_config(tmp_path):
    shutil.copy(GOLDEN / "tokenizer.model", tmp_path)
    assert (
        TiktokenTokenizer(tmp_path / "tokenizer.model", SPECIAL).token_id("<|observation|>") == 300
    )


def test_damaged_tokenizer_file(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"not base64!\n")
    with pytest.raises(ModelError, match="not a tokenizer file"):
        TiktokenTokenizer(tmp_path / "tokenizer.model", SPECIAL)


@pytest.mark.skipif(
    "GLM4_TOKENIZER" not in os.environ,
    reason="GLM4_TOKENIZER: path of the released tokenizer.model",
)
def test_released_tokenizer(tmp_path):
    shutil.copy(os.environ["GLM4_TOKENIZER"], tmp_path / "tokenizer.model")
    shutil.copy(GOLDEN / "config.json", tmp_path)
    family = family_of(tmp_path)
    assert {piece: family.tokenizer.token_id(piece) for piece in SPECIAL} == TOKENS["special"]
    for text, ids in TOKENS["encode"]:
        assert family.tokenizer.encode(text) == ids and family.tokenizer.decode(ids) == text
    for chat in TOKENS["chat"]:
        if not any("image" in message for message in chat["messages"]):
            assert family.prompt(chat["messages"]).ids.tolist() == chat["ids"]


# the release's names and shapes

H, Q, V, FFN = 4096, 4608, 151552, 13696
CHATGLM = {
    "embedding.word_embeddings.weight": (V, H),
    "encoder.final_layernorm.weight": (H,),
    "output_layer.weight": (V, H),
    "encoder.layers.{}.input_layernorm.weight": (H,),
    "encoder.layers.{}.post_attention_layernorm.weight": (H,),
    "encoder.layers.{}.self_attention.query_key_value.weight": (Q, H),
    "encoder.layers.{}.self_attention.query_key_value.bias": (Q,),
    "encoder.layers.{}.self_attention.dense.weight": (H, H),
    "encoder.layers.{}.mlp.dense_h_to_4h.weight": (2 * FFN, H),
    "encoder.layers.{}.mlp.dense_4h_to_h.weight": (H, FFN),
}
HF = {
    "model.embed_tokens.weight": (V, H),
    "model.norm.weight": (H,),
    "lm_head.weight": (V, H),
    "model.layers.{}.input_layernorm.weight": (H,),
    "model.layers.{}.post_attention_layernorm.weight": (H,),
    "model.layers.{}.self_attn.q_proj.weight": (H, H),
    "model.layers.{}.self_attn.q_proj.bias": (H,),
    "model.layers.{}.self_attn.k_proj.weight": (256, H),
    "model.layers.{}.self_attn.k_proj.bias": (256,),
    "model.layers.{}.self_attn.v_proj.weight": (256, H),
    "model.layers.{}.self_attn.v_proj.bias": (256,),
    "model.layers.{}.self_attn.o_proj.weight": (H, H),
    "model.layers.{}.mlp.gate_up_proj.weight": (2 * FFN, H),
    "model.layers.{}.mlp.down_proj.weight": (H, FFN),
}


def released(name):
    config = json.loads((RELEASED / f"{name}.json").read_text(encoding="utf-8"))["config"]
    return Glm4("nowhere", config)


@pytest.mark.parametrize(
    "name, prefix, table",
    [("glm-4-9b-chat", "transformer.", CHATGLM), ("glm-4-9b-chat-hf", "", HF)],
)
def test_names_and_shapes_of_the_release(name, prefix, table):
    expected = {
        prefix + key.format(i): shape
        for key, shape in table.items()
        for i in range(40 if "{}" in key else 1)
    }
    ours = {w.source: w.shape for w in released(name).weights()}
    assert ours.pop("transformer.rotary_pos_emb.inv_freq", None) == ((32,) if prefix else None)
    assert ours == expected
    assert sum(map(math.prod, ours.values())) == 9_399_951_360


def test_both_layouts_describe_the_same_decoder():
    assert released("glm-4-9b-chat").decoder == released("glm-4-9b-chat-hf").decoder
    targets = [
        {part.target for w in released(name).weights() for part in w.parts}
        for name in ("glm-4-9b-chat", "glm-4-9b-chat-hf")
    ]
    assert targets[0] == targets[1]
