"""The plan of every released model on every chip: memory against the published shapes, estimates against published figures."""

import json
import re
import shutil
from statistics import mean

import paths
import pytest

from models.config import DecoderConfig, Rope
from runtime import Engine
from runtime.ascend.chips import CHIPS, GIB
from runtime.common.errors import ToolkitError, run_command
from runtime.common.notes import notes_on_stderr
from runtime.engine.loading.memory import make_plan, max_model_len_for, on_npu, plan_engine
from runtime.engine.options import EngineOptions
from runtime.parallel.split import Split
from runtime.plan import __main__ as plan
from runtime.plan.estimate import estimate, find_family, roofline_of
from runtime.plan.options import PlanOptions
from runtime.plan.roofline import Roofline, layer_values

GOLDEN = paths.GOLDEN
# bytes of the float16 decoder, and of the vision encoder, by the releases' own parameter counts (in 10^9)
PARAMETERS = {
    "visualglm-6b": (6.71, 1.09),
    "glm-4-9b-chat": (9.40, 0),
    "glm-4-9b-chat-hf": (9.40, 0),
    "glm-4-9b-0414": (9.40, 0),
    "glm-4v-9b": (9.40, 4.51),
    "glm-ocr": (0.67, 0.43),
    "glm-4.1v-9b-thinking": (9.40, 0.89),
    "glm-4.6v-flash": (9.40, 0.89),
    "llava-1.5-7b": (6.74, 0.31),
    "glm-edge-1.5b-chat": (1.59, 0),
    "glm-edge-4b-chat": (4.27, 0),
    "glm-edge-v-2b": (1.59, 0.46),
    "glm-edge-v-5b": (4.27, 0.50),
}
SOCS = ("Ascend910B3", "Ascend910B4", "Ascend310P3")
MEMORY_ERROR, TIME_ERROR = 0.10, 0.35


@pytest.fixture(scope="module")
def family():
    return {name: find_family(name) for name in PARAMETERS}


def run(capsys, *argv):
    code = run_command(plan.main, list(argv))
    return code, *capsys.readouterr()


# every model, chip and number of devices


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("soc", SOCS)
@pytest.mark.parametrize("name", PARAMETERS)
def test_table(family, name, soc, size):
    found = family[name]
    options = PlanOptions(
        model=name, soc=soc, tensor_parallel_size=size, batch=8, max_model_len=2048
    )
    if size > 2 and found.decoder.kv_heads == 6:
        with pytest.raises(ToolkitError, match="6 key/value heads; use 1, 2$"):
            estimate(found, options)
        return
    result, alone = (
        estimate(found, PlanOptions(**vars(options) | {"tensor_parallel_size": n}))
        for n in (size, 1)
    )
    c = found.decoder
    size_of = result["bytes"]
    chip = CHIPS[soc]
    decoder, vision = PARAMETERS[name]
    assert alone["bytes"]["weights"] == pytest.approx(2e9 * decoder, rel=0.03)
    assert size_of["vision"] == pytest.approx(2e9 * vision * 1.2, rel=0.03)
    embedding = 2 * c.vocab_size * c.hidden
    split_only = (alone["bytes"]["weights"] - embedding) / size
    assert (
        split_only + embedding <= size_of["weights"] < 1.05 * split_only + embedding
    )  # norms, copied key/value heads
    assert size_of["cache"] == 8 * 2048 * 2 * 2 * c.layers * max(1, c.kv_heads // size) * c.head_dim
    assert size_of["total"] == sum(
        size_of[k] for k in ("weights", "cache", "vision", "workspace", "in_use_when_idle")
    )
    assert result["fits"] == (size_of["total"] <= chip.memory) and size_of["device"] == chip.memory
    assert (
        0 < result["token_ms"] <= result["batch_token_ms"]
        and result["token_ms"] < result["first_token_ms"]
    )
    at_least = (size_of["weights"] - embedding) / chip.bandwidth * 1e3
    assert at_least < result["token_ms"] < 3 * at_least + 5


def test_what_fits(family):
    """The 32 GB chip holds every model alone; GLM-4V-9B with its 9 GB encoder does not fit a 24 GB one."""

    def fits(name, soc, size, batch=1):
        return estimate(
            family[name],
            PlanOptions(
                model=name, soc=soc, tensor_parallel_size=size, batch=batch, max_model_len=2048
            ),
        )["fits"]

    assert all(fits(name, "Ascend910B3", 1, 8) for name in PARAMETERS)
    assert not fits("glm-4v-9b", "Ascend310P3", 1) and fits("glm-4v-9b", "Ascend310P3", 4, 8)
    assert fits("visualglm-6b", "Ascend310P3", 1) and not fits("visualglm-6b", "Ascend310P3", 1, 8)


def test_more_devices_need_less_each_and_are_faster(family):
    for name in ("visualglm-6b", "glm-4-9b-chat", "llava-1.5-7b"):
        found = [
            estimate(
                family[name], PlanOptions(model=name, tensor_parallel_size=size, max_model_len=2048)
            )
            for size in (1, 2, 4, 8)
        ]
        for key in (
            lambda r: r["bytes"]["weights"],
            lambda r: r["token_ms"],
            lambda r: r["first_token_ms"],
        ):
            values = [key(result) for result in found]
            assert values == sorted(values, reverse=True)


# published figures (docs/plan.md)

INPUTS = [32, 64, 128, 256, 512, 1024]  # the published grid: input and output lengths


def published(family) -> dict[str, tuple[float, float]]:
    """What -> (published, estimated)."""
    model = family["visualglm-6b"]
    chip = CHIPS["Ascend910B3"]
    sized = on_npu(make_plan(model, "float16", 2048), model, 2048)
    roofline = roofline_of(model, sized, chip)
    length = round(mean(INPUTS) * 1.5)  # half of the answer behind the prompt
    qwen = DecoderConfig(
        vocab_size=151936,
        hidden=4096,
        layers=36,
        heads=32,
        kv_heads=8,
        head_dim=128,
        ffn=12288,
        rope=Rope(dim=128),
        eps=1e-6,
        max_length=40960,
    )
    half_duo = Roofline(
        CHIPS["Ascend310P3"], Split(qwen), 2 * (36 * layer_values(qwen) + 151936 * 4096), 2
    )
    return {
        "memory": (20500, (sized.total + chip.idle) / 2**20),
        "first token": (54.25, mean(roofline.prompt(n, bidirectional=True) for n in INPUTS) * 1e3),
        "token": (16.73, roofline.token(1, length) * 1e3),
        "token of 8": (23.37, roofline.token(8, length) * 1e3),
        "Qwen3-8B on 310P": (100, half_duo.token(1, 512) * 1e3),
    }


def test_published_figures(family):
    for what, (theirs, ours) in published(family).items():
        limit = MEMORY_ERROR if what == "memory" else TIME_ERROR
        assert ours == pytest.approx(theirs, rel=limit), what


def test_docs_show_these_errors(family):
    text = (paths.ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    for what, (theirs, ours) in published(family).items():
        assert f"{round(100 * (ours / theirs - 1)):+d} %".replace("-", "−") in text, (what, ours)


# the engine's plan is the same one


def test_engine_prints_the_plan_before_it_loads(capsys, monkeypatch, tmp_path):
    shutil.copytree(GOLDEN / "llava", tmp_path / "model")
    for file in (tmp_path / "model").glob("*.safetensors*"):
        file.unlink()
    with notes_on_stderr(), pytest.raises(Exception, match="holds no weights"):
        Engine(tmp_path / "model", max_model_len=64)
    assert (
        capsys.readouterr().err
        == "memory: weights 0.00 + cache 0.00 for 512 tokens + vision 0.00 = 0.00 GiB\n"
    )


def engine_plan(family, gibs, **options):
    settings = EngineOptions(dtype="bfloat16", **options)
    return plan_engine(
        family,
        "bfloat16",
        max_model_len_for(family, settings.max_model_len),
        settings,
        int(gibs * GIB),
    )


def test_cache_takes_what_memory_is_left(family):
    """VisualGLM: 12.5 GiB of weights, 4.1 of encoder in float32, 0.88 of cache for every 2048 tokens."""
    whole = engine_plan(family["visualglm-6b"], 64)
    assert (
        whole.cache_tokens == whole.wanted_tokens == 8 * 2048 and " of the " not in whole.describe()
    )
    assert engine_plan(family["visualglm-6b"], 64, max_num_seqs=1).cache == whole.cache // 8
    cut = engine_plan(family["visualglm-6b"], 20)
    assert (
        2048 <= cut.cache_tokens < 8 * 2048 and cut.total <= 0.9 * 20 * GIB < cut.total + GIB / 100
    )
    assert f"for {cut.cache_tokens} of the {8 * 2048} tokens + vision 4.08" in cut.describe()
    assert (
        engine_plan(family["visualglm-6b"], 20, memory_utilization=1).cache_tokens
        > cut.cache_tokens
    )


def test_refusal_names_what_fits(family):
    with pytest.raises(ToolkitError) as refusal:
        engine_plan(family["visualglm-6b"], 18.9, max_num_seqs=4)
    room = int(re.search("--max-num-seqs 1 --max-model-len ([0-9]+)$", str(refusal.value))[1])
    assert 0 < room < 2048 and "only 18.90 GiB are free, of which --memory-utilization 0.9" in str(
        refusal.value
    )
    assert (
        engine_plan(family["visualglm-6b"], 18.9, max_num_seqs=1, max_model_len=room).cache_tokens
        == room
    )
    with pytest.raises(
        ToolkitError, match="alone do not fit: use --dtype bfloat16, --cpu-weights int8 or int4, or"
    ):
        engine_plan(family["visualglm-6b"], 14)
    assert (
        engine_plan(family["visualglm-6b"], 14, cpu_weights="int8", max_num_seqs=1).cache_tokens
        == 2048
    )


def test_a_cache_of_a_given_size_is_not_cut(family):
    """What rank 0 decided holds for the other devices too."""
    assert engine_plan(family["glm-4-9b-chat"], 64, cache_tokens=12345).cache_tokens == 12345
    with pytest.raises(ToolkitError, match="are free"):
        engine_plan(family["glm-4-9b-chat"], 22, cache_tokens=200000)


def test_plan_of_an_npu_says_what_it_counts(family):
    sized = on_npu(make_plan(family["glm-4v-9b"], "bfloat16", 16384, 2), family["glm-4v-9b"], 2048)
    assert sized.describe().startswith(
        "memory: weights 9.33 + cache 0.31 for 16384 tokens + vision 10.07 + workspace "
    )
    assert sized.describe().endswith(" GiB on each of 2 devices")
    assert on_npu(sized, family["glm-4v-9b"], 2048, vision=False).vision == 0
    alone = on_npu(make_plan(family["glm-4v-9b"], "bfloat16", 16384), family["glm-4v-9b"], 2048)
    assert sized.workspace > alone.workspace - GIB / 2  # buffers of the collectives


# the command


def test_command(capsys):
    code, out, err = run(
        capsys,
        "--model",
        "visualglm-6b",
        "--soc",
        "910b3",
        "--batch",
        "1",
        "--max-model-len",
        "2048",
    )
    assert (
        code == 0
        and not err
        and "visualglm on 1 x Ascend910B3, float16, 1 sequences of 2048 tokens" in out
    )
    assert "of 64.00: fits" in out and "estimated, not measured" in out


def test_json_and_a_model_that_does_not_fit(capsys):
    code, out, _ = run(
        capsys, "--model", "glm-4v-9b", "--soc", "Ascend310P3", "--batch", "4", "--json"
    )
    found = json.loads(out)
    assert (
        code == 1
        and not found["fits"]
        and found["dtype"] == "float16"
        and found["max_model_len"] == 8192
    )
    code, out, _ = run(capsys, "--model", "glm-4v-9b", "--soc", "Ascend310P3")
    assert code == 1 and "DOES NOT FIT: use more devices" in out


def test_config_json_alone_is_enough(capsys, tmp_path):
    shutil.copy(GOLDEN / "visualglm" / "config.json", tmp_path)
    assert run(capsys, "--model", str(tmp_path), "--max_model_len", "128")[0] == 0


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--model", "glm-5"],
            "--model glm-5 is neither a folder nor a release; known releases: glm-4-9b-0414,",
        ),
        (
            ["--model", "glm-4-9b-chat", "--soc", "Ascend910B"],
            "--soc is 'Ascend910B': use one of Ascend910B1,",
        ),
        (
            ["--model", "glm-4-9b-chat", "--soc", "310P3", "--dtype", "bf16"],
            "Ascend 310P does not support --dtype bfloat16",
        ),
        (
            ["--model", "visualglm-6b", "--max-model-len", "4096"],
            "--max-model-len 4096 is more than the 2048 tokens",
        ),
        (
            ["--model", "visualglm-6b", "--input-len", "4096"],
            "--input-len 4096 is more than --max-model-len 2048",
        ),
        (["--model", "visualglm-6b", "--batch", "0"], "--batch is 0: 1 or more is needed"),
        (["--model", "visualglm-6b", "-tp", "3"], "--tensor-parallel-size is 3: use 1, 2, 4 or 8"),
        (
            ["--model", "glm-edge-4b-chat", "--tp", "8"],
            "does not divide glm-edge's 6 key/value heads; use 1, 2",
        ),
        (["--model", __file__], "is a file; give the folder that holds config.json"),
    ],
)
def test_mistakes(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert code == 2 and not out and message in err and err.count("\n") == 1
