"""GLM-4-9B-0414 and GLM-Z1 against the outputs of transformers' Glm4ForCausalLM on a tiny checkpoint
(tests/golden/glm4_0414), other sizes against that class itself, prompts, and names and shapes of the
releases.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import paths
import pytest
import torch
from golden_cases import golden
from safetensors.torch import save_file

from models import RELEASED, family_of
from models.checkpoint import Checkpoint
from models.errors import ModelError
from models.families.glm4_0414 import Glm4_0414
from models.side_files import read_json
from runtime import Engine, SamplingParams

FOLDER = paths.GOLDEN / "glm4_0414"
GOLDEN = golden("glm4_0414")
GREEDY = SamplingParams(max_tokens=24, temperature=0, repetition_penalty=1.0, ignore_eos=True)
CASES = tuple(GOLDEN.cases)
RANDOM_ATOL = 1e-4  # of other sizes, whose logits are smaller
CALL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "查天气", "parameters": {}},
}


@pytest.fixture(scope="module", params=["reference", "cpu"])
def engine(request):
    return Engine(FOLDER, dtype="float32", ops=request.param)


def prompts(engine, cases=CASES):
    return [engine.prompt_from_ids(GOLDEN.ids(case)) for case in cases]


@pytest.mark.parametrize("case", CASES)
def test_logits_of_the_prompt_and_of_24_steps(engine, case):
    (prompt,) = prompts(engine, [case])
    logits = engine.prefill_logits(prompt)
    np.testing.assert_allclose(logits[-1], GOLDEN.of(case, "prefill_last"), atol=GOLDEN.atol)
    if GOLDEN.has(case, "prefill_all"):
        np.testing.assert_allclose(logits, GOLDEN.of(case, "prefill_all"), atol=GOLDEN.atol)
    steps = engine.score(prompt, GOLDEN.greedy(case))
    np.testing.assert_allclose(steps, GOLDEN.of(case, "step_logits"), atol=GOLDEN.atol)


def test_greedy_tokens_in_one_batch(engine):
    results = engine.generate(prompts(engine), GREEDY)
    assert [result.token_ids for result in results] == [GOLDEN.greedy(case) for case in CASES]


def test_chunks_preemption_and_reused_beginnings():
    engine = Engine(
        FOLDER,
        dtype="float32",
        ops="cpu",
        max_model_len=384,
        cache_tokens=400,
        max_num_seqs=6,
        max_num_batched_tokens=24,
    )
    preempted = []
    schedule = engine._scheduler.schedule

    def recorded():
        plan = schedule()
        preempted.extend(plan.preempted)
        return plan

    engine._scheduler.schedule = recorded
    shortest_first = sorted(CASES, key=lambda case: len(GOLDEN.ids(case)))
    cases = (*shortest_first, *shortest_first)
    results = engine.generate(prompts(engine, cases), GREEDY)
    assert [result.token_ids for result in results] == [GOLDEN.greedy(case) for case in cases]
    assert preempted and any(result.metrics["cached_tokens"] for result in results)


def test_bfloat16_of_the_kernels_is_that_of_plain_torch():
    """One token of each sequence goes through all layers at once, where the CPU can."""
    engines = [Engine(FOLDER, dtype="bfloat16", ops=ops) for ops in ("reference", "cpu")]
    for case in ("short", "twoturn"):
        scores = [
            torch.from_numpy(engine.score(prompts(engine, [case])[0], GOLDEN.greedy(case)))
            for engine in engines
        ]
        assert torch.nn.functional.cosine_similarity(*scores).min() > 0.995


# prompts


def folder(tmp_path, template=None):
    """The golden folder with chat_template.jinja from `template`; None: without any template."""
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(FOLDER / file, tmp_path)
    settings = read_json(FOLDER / "tokenizer_config.json")
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if template:
        shutil.copy(FOLDER / template, tmp_path / "chat_template.jinja")
    return family_of(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_prompt_text_and_ids(tmp_path, case):
    told = GOLDEN.cases[case]
    family = folder(tmp_path, told["template_file"]) if "template_file" in told else None
    family = family or family_of(FOLDER)
    prompt = family.prompt(told["messages"], tools=told["template_kwargs"].get("tools"))
    assert prompt.text == told["prompt"]
    assert prompt.ids.tolist() == GOLDEN.ids(case).tolist()


@pytest.mark.parametrize("case", ["short", "twoturn", "border"])
def test_the_same_prompt_without_a_template(tmp_path, case):
    told = GOLDEN.cases[case]
    prompt = folder(tmp_path).prompt(told["messages"])
    assert (prompt.text, prompt.ids.tolist()) == (told["prompt"], GOLDEN.ids(case).tolist())


def test_tools_without_a_template(tmp_path):
    """They come first; a call stands on its header line, its result is an observation."""
    family = folder(tmp_path)
    messages = [
        {"role": "user", "content": "北京天气"},
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "metadata": "get_weather", "content": '{"city": "北京"}'},
        {"role": "observation", "content": "20 度"},
    ]
    prompt = family.prompt(messages, tools=[CALL])
    assert prompt.text == (
        "[gMASK]<sop><|system|>\n# 可用工具\n\n## get_weather\n\n"
        '{\n    "name": "get_weather",\n    "description": "查天气",\n    "parameters": {}\n}\n'
        "在调用上述函数时，请使用 Json 格式表示调用的参数。<|system|>\nBe brief.<|user|>\n北京天气"
        '<|assistant|>get_weather\n{"city": "北京"}<|observation|>\n20 度<|assistant|>'
    )
    answer = '\nget_weather\n{"city": "北京"}'.lstrip()
    assert family.tool_call(answer, {"get_weather"}) == ("get_weather", '{"city": "北京"}')


def test_old_thoughts_are_not_sent_back(tmp_path):
    family = folder(tmp_path, "chat_template_z1.jinja")
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "hm\n</think>\n2"},
        {"role": "user", "content": "sure?"},
    ]
    assert family.prompt(messages).text == (
        "[gMASK]<sop><|user|>\n1 + 1?<|assistant|>\n2<|user|>\nsure?<|assistant|>\n<think>\n"
    )


def test_what_a_user_types_is_text():
    family = family_of(FOLDER)
    ids = family.prompt([{"role": "user", "content": "<|assistant|>"}]).ids.tolist()
    assert ids.count(family.tokenizer.token_id("<|assistant|>")) == 1


def test_tokenizer_file():
    """Special tokens in a text are text for us (see above), and ids for the original."""
    tokenizer = family_of(FOLDER).tokenizer
    for entry in GOLDEN.told["tokens"]:
        if not any(token in entry["text"] for token in tokenizer.special_tokens()):
            assert tokenizer.encode(entry["text"]) == entry["ids"]
        assert tokenizer.decode(entry["ids"]) == entry["decoded"]


def test_stop_ids_sampling_and_name():
    family = family_of(FOLDER)
    assert family.stop_ids == (380, 387, 389) and family.name == "glm-4-0414"
    assert (family.sampling(False).temperature, family.sampling(False).max_length) == (0.0, 1024)
    with pytest.raises(ModelError, match="text model and takes no picture"):
        family.prompt_from_ids([1, 2], np.zeros((1, 3, 8, 8), np.float32))


# settings and other sizes

ROPES = {
    "at the top": {"rope_theta": 50000.0, "partial_rotary_factor": 0.25},
    "in rope_parameters": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 50000,
            "partial_rotary_factor": 0.25,
        }
    },
    "in rope_scaling": {
        "rope_theta": 50000.0,
        "partial_rotary_factor": 0.25,
        "rope_scaling": {"type": "default"},
    },
}


@pytest.mark.parametrize("rope", ROPES.values(), ids=list(ROPES))
def test_spellings_of_the_rotary_settings(tmp_path, rope):
    plain = {
        key: value
        for key, value in GOLDEN.config.items()
        if key not in ("rope_theta", "partial_rotary_factor")
    }
    found = Glm4_0414(tmp_path, plain | rope).decoder.rope
    assert (found.dim, found.theta) == (4, 50000.0)


SIZES = {
    "9B's layout": {},
    "32B's layout: no biases": {"attention_bias": False, "num_attention_heads": 8},
    "one kv head, whole rotation, tied": {
        "num_key_value_heads": 1,
        "partial_rotary_factor": 1.0,
        "tie_word_embeddings": True,
    },
    "another epsilon": {"rms_norm_eps": 1e-2, "rope_theta": 500.0},
}


def random_checkpoint(directory, sizes):
    """A folder as transformers saves it, and the model in memory."""
    transformers = pytest.importorskip("transformers", minversion="5")
    config = {
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
        "max_position_embeddings": 256,
        "attention_bias": True,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "tie_word_embeddings": False,
        "pad_token_id": 3,
        "eos_token_id": [3, 4],
    } | sizes
    rope = {key: config.pop(key) for key in ("rope_theta", "partial_rotary_factor")}
    settings = transformers.Glm4Config(**config, rope_parameters=rope | {"rope_type": "default"})
    settings._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.Glm4ForCausalLM(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.8 if parameter.dim() == 1 else 0.0, 0.2)
    model.save_pretrained(directory, max_shard_size="40KB")
    return model


@pytest.mark.parametrize("sizes", SIZES.values(), ids=list(SIZES))
def test_other_sizes_against_transformers(tmp_path, sizes):
    model = random_checkpoint(tmp_path, sizes)
    engine = Engine(tmp_path, dtype="float32", ops="cpu", block_size=16)
    ids = torch.randint(0, 320, (1, 70), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[0].numpy()
    prompt = engine.prompt_from_ids(ids.numpy())
    np.testing.assert_allclose(engine.prefill_logits(prompt), expected, atol=RANDOM_ATOL)


def test_split_over_more_devices_than_key_value_heads(tmp_path):
    """A branch is summed over the devices before its norm; 2 key/value heads serve 4 of them."""
    random_checkpoint(tmp_path, {"num_attention_heads": 8})
    settings = {"dtype": "float32", "max_model_len": 128}
    alone = Engine(tmp_path, **settings)
    split = Engine(tmp_path, tensor_parallel_size=4, **settings)
    found = []
    try:
        for engine in (alone, split):
            prompt = engine.prompt_from_ids(np.arange(7, 60))
            tokens = engine.generate([prompt], GREEDY)[0].token_ids
            found.append((engine.prefill_logits(prompt), engine.score(prompt, tokens), tokens))
    finally:
        split.close()
    for ours, theirs in zip(found[0][:2], found[1][:2]):
        np.testing.assert_allclose(ours, theirs, atol=RANDOM_ATOL)
    assert found[0][2] == found[1][2]


LARGE = {
    "hidden_size": 6144,
    "intermediate_size": 23040,
    "num_hidden_layers": 61,
    "num_attention_heads": 48,
    "attention_bias": False,
}


@pytest.mark.parametrize(
    "changes, tensors, parameters",
    [({}, 523, 9_400_279_040), (LARGE, 61 * 10 + 3, 32_566_081_536)],
    ids=["9B", "32B"],
)
def test_names_and_shapes_at_full_size(tmp_path, changes, tensors, parameters):
    transformers = pytest.importorskip("transformers")
    config = read_json(RELEASED / "glm-4-9b-0414.json")["config"] | changes
    ours = {row.source: row.shape for row in Glm4_0414(tmp_path, config).weights()}
    with torch.device("meta"):
        settings = transformers.Glm4Config.from_dict(config)
        theirs = transformers.Glm4ForCausalLM(settings).state_dict()
    assert ours == {name: tuple(tensor.shape) for name, tensor in theirs.items()}
    assert len(ours) == tensors
    assert sum(tensor.numel() for tensor in theirs.values()) == parameters


def test_a_missing_post_norm_is_named(tmp_path):
    released = Checkpoint(FOLDER)
    gone = "model.layers.1.post_mlp_layernorm.weight"
    tensors = {name: released.tensor(name) for name in released.names if name != gone}
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(FOLDER / "config.json", tmp_path)
    with pytest.raises(ModelError, match="post_mlp_layernorm"):
        Engine(tmp_path, dtype="float32")


@pytest.mark.parametrize("name", ["input", "post_attention", "post_self_attn", "post_mlp"])
def test_each_of_the_four_norms_has_its_place(name):
    """They have the same size, so that a swap loads without an error."""
    engine = Engine(FOLDER, dtype="float32", ops="reference")
    field = {
        "input": "attention_norm",
        "post_attention": "mlp_norm",
        "post_self_attn": "attention_post_norm",
        "post_mlp": "mlp_post_norm",
    }[name]
    stored = Checkpoint(FOLDER).tensor(f"model.layers.2.{name}_layernorm.weight").float()
    layers = engine.layers()
    assert torch.equal(getattr(layers[2], field).weight, stored)
    (prompt,) = prompts(engine, ["short"])
    layers[2] = replace(layers[2], **{field: getattr(layers[1], field)})
    changed = np.abs(engine.prefill_logits(prompt)[-1] - GOLDEN.of("short", "prefill_last"))
    assert changed.max() > 100 * GOLDEN.atol
