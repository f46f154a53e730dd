"""What torch_npu launches for our decoder, on stand-in CANN libraries (see run.py, which sets the
environment).

The real wheel's C++ runs: argument checks, output shapes, storage formats, aclnn or aclop, graph
capture. No kernel computes, so that only the log is tested. launches/<chip>_<kernel set>.txt holds
the expected launches of every released decoder at full size, with "_before_2.13" for those
releases of torch_npu; UPDATE=1 in the environment writes them anew.
"""

import json
import os
import re
from itertools import groupby
from pathlib import Path

import paths
import pytest
import torch
from torch.distributed import FileStore

from models import family_of
from models.network.decoder import Decoder, Step
from runtime import Engine
from runtime.ascend.cann import numbers
from runtime.engine.device_graphs import BATCH_SIZES, DecodeGraphs
from runtime.engine.kv_cache import KVCache
from runtime.engine.loading.weights import MATRICES
from runtime.engine.sequence import Sequence
from runtime.ops import choose
from runtime.parallel.team import Team, leave

ROOT = Path(__file__).resolve().parents[2]
CHIP = os.environ["STUB_SOC"]
KERNELS = os.environ["TESTED_KERNELS"]  # what --kernels names
LOG = Path(os.environ["STUB_LOG"])
LAUNCHES = Path(__file__).with_name("launches")
DECODERS = (
    "visualglm-6b",
    "glm-4-9b-chat",
    "glm-4-9b-0414",
    "glm-edge-1.5b-chat",
    "glm-edge-4b-chat",
    "llava-1.5-7b",
    "glm-ocr",
    "glm-4.1v-9b-thinking",
)
PREFIX_LM = ("visualglm-6b",)  # whose prompts begin with a context that sees itself both ways
TINY = paths.FAMILIES
# launches per layer and decoded token on 910B; a norm behind each branch is one more
LIMITS = {"visualglm-6b": 13, "glm-4-9b-chat": 12, "glm-4-9b-0414": 13}
MARK = "-- layer"
SEED = "InplaceFillScalar"  # before 2.13 a replay begins with the random generator's state
NZ, WIDTH = 29, 2  # storage format; blocks per sequence

# steps: name -> (query lengths, lengths in the cache, causal)
STEPS = {
    "context of 5 tokens": ([5], [5], False),
    "prompt of 5 tokens": ([5], [5], True),
    "extension by 3 tokens": ([3], [8], True),
    "token of 1 sequence": ([1], [6], True),
    "token of 3 sequences": ([1, 1, 1], [6, 130, 1], True),
}


class Launches:
    """The log: lines that were written since the last `clear`, as short names."""

    def clear(self):
        LOG.write_text("")

    def names(self) -> list[str]:
        return [_short(line) for line in LOG.read_text().splitlines()]


def _short(line: str) -> str:
    """` [1,64:1:2]aclnnMm` -> `Mm`; tensors in NZ format and in host memory are counted behind the
    name."""
    formats = re.findall(r"\[[\d,]*:\d+:(\d+)(:host)?\]", line)
    name = (
        re.sub(r"\[[^]]*\]", "", line)
        .replace("atb infer::", "atb ")
        .replace("Param in", "")
        .replace(" out", "")
    )
    notes = {"NZ": sum(f == str(NZ) for f, _ in formats), "host": sum(bool(h) for _, h in formats)}
    text = ", ".join(f"{count} {note}" for note, count in notes.items() if count)
    return " ".join(name.replace("aclnn", "").split()) + (f" ({text})" if text else "")


@pytest.fixture(scope="session")
def ops():
    return choose("auto", "npu:0", KERNELS)


@pytest.fixture
def launches():
    return Launches()


# full size, empty weights: memory that is never touched costs nothing


def full_size(name: str, folder: Path, ops) -> Decoder:
    (folder / "config.json").write_text((ROOT / "models" / "released" / f"{name}.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config.get("config", config)))
    family = family_of(folder)
    memory = {}
    targets = {str(part.target) for weight in family.weights() for part in weight.parts}
    c = family.decoder
    rows = {
        "qkv": (c.heads + 2 * c.kv_heads) * c.head_dim,
        "up": c.ffn * (1 + (c.activation == "swiglu")),
        "embed": c.vocab_size,
        "lm_head": c.vocab_size,
    }
    columns = {"out": c.heads * c.head_dim, "down": c.ffn}

    def empty(target):
        """One tensor per kind of weight, shared by all layers."""
        kind = re.sub(r"layers\.\d+\.", "", target)
        part, _, field = kind.partition(".")
        shape = (rows.get(part, c.hidden),)
        if field == "weight" and "norm" not in part:
            shape += (columns.get(part, c.hidden),)
        if kind not in memory:
            tensor = torch.empty(shape, dtype=torch.float16, device="npu:0")
            memory[kind] = ops.pack(tensor) if kind.endswith(MATRICES) else tensor
        return memory[kind]

    names = {t for t in targets if not t.startswith("vision.")} | {"lm_head.weight"}
    return Decoder(c, {name: empty(name) for name in names}, ops)


def run_step(decoder, q_lens, kv_lens, causal, launches) -> list[str]:
    """Names of all launches of one step, a mark before each layer's attention."""
    c = decoder.config
    batch = len(q_lens)
    tokens = sum(q_lens)
    cache = KVCache(
        c, batch * WIDTH, decoder.ops.default_block_size, torch.float16, "npu:0", decoder.ops
    )
    table = torch.arange(batch * WIDTH, dtype=torch.int32).view(batch, WIDTH)
    angles = torch.zeros(tokens, c.head_dim, dtype=torch.float16)
    step = decoder.ops.begin(
        Step(angles, angles, torch.arange(tokens), table, q_lens, kv_lens, causal), c, "npu:0"
    )
    plain = decoder._attention
    ids = torch.zeros(tokens, dtype=torch.int64, device="npu:0")

    def marked(*arguments):
        with LOG.open("a") as log:
            log.write(MARK + "\n")
        return plain(*arguments)

    decoder._attention = marked
    launches.clear()
    decoder.logits(decoder.forward(decoder.embed(ids), step, cache))
    decoder._attention = plain
    return launches.names()


def parts(names: list[str], layers: int) -> tuple[list[str], list[str], list[str]]:
    """Launches before the layers, of each layer (all alike, from its attention to the next norm),
    and after them."""
    groups = [list(group) for mark, group in groupby(names, MARK.__eq__) if not mark]
    before, *repeated = groups
    layer = repeated[0]
    last = repeated[-1]
    assert (
        len(repeated) == layers
        and all(group == layer for group in repeated[:-1])
        and last[: len(layer)] == layer
    )
    return before, layer, last[len(layer) :]


def describe(name, step, before, layer, after, layers) -> str:
    total = len(before) + layers * len(layer) + len(after)
    lists = zip(("before", "layer ", "after "), (before, layer, after))
    return (
        f"{name}, {step}: {len(before)} + {layers} x {len(layer)} + {len(after)} = {total}\n"
        + "".join(f"  {label}  {', '.join(names)}\n" for label, names in lists)
    )


@pytest.mark.parametrize("name", DECODERS)
def test_launches_at_full_size(name, tmp_path, ops, launches):
    decoder = full_size(name, tmp_path, ops)
    text = ""
    with torch.inference_mode():
        for lengths in STEPS.values():
            run_step(decoder, *lengths, launches)  # masks are made at first use
        for step, (q_lens, kv_lens, causal) in STEPS.items():
            if not causal and name not in PREFIX_LM:
                continue
            before, layer, after = parts(
                run_step(decoder, q_lens, kv_lens, causal, launches), decoder.config.layers
            )
            text += describe(name, step, before, layer, after, decoder.config.layers) + "\n"
            if not aclop_matmuls(ops):
                assert not any("aclop" in launch for launch in before + layer + after)
            if CHIP.startswith("Ascend910B") and step.startswith("token"):
                keys_and_values_apart = ops.kernels.cache_write == "scatter_rows"
                assert len(layer) <= LIMITS.get(name, 13) + keys_and_values_apart
    assert_expected(name, text, expected_launches())


def expected_launches() -> Path:
    """The file for the release of torch_npu, which goes with that of torch."""
    release = "" if numbers(torch.__version__) >= (2, 13) else "_before_2.13"
    return LAUNCHES / f"{CHIP}_{KERNELS}{release}.txt"


def aclop_matmuls(ops) -> bool:
    """Whether torch_npu is so old that it gives matmuls with tiled weights to aclop."""
    return numbers(torch.__version__) < (2, 13) and ops.soc.weight_format == NZ


def assert_expected(name: str, text: str, file: Path):
    sections = file.read_text() if file.exists() else ""
    kept = [s.strip() for s in sections.split("\n\n") if s.strip() and not s.startswith(name + ",")]
    if os.environ.get("UPDATE"):
        file.write_text("\n\n".join(kept + [text.strip()]) + "\n")
        return
    expected = [s.strip() for s in sections.split("\n\n") if s.startswith(name + ",")]
    assert text.strip().split("\n\n") == expected


# whole engines on the tiny checkpoints


@pytest.mark.parametrize("name", TINY)
def test_engine_prefills_decodes_and_replays(name, launches):
    golden = ROOT / "tests" / "golden"
    engine = Engine(
        golden / name,
        device="npu:0",
        kernels=KERNELS,
        vision="torch",
        max_model_len=256,
        dtype="float16",
    )
    image = [{"type": "image", "image": golden / "visualglm" / "image.png"}]
    content = (image if engine.family.vision else []) + [{"type": "text", "text": "hello"}]
    prompt = engine.prompt([{"role": "user", "content": content}])
    assert engine.prefill_logits(prompt).shape == (
        len(prompt.ids),
        engine.family.decoder.vocab_size,
    )
    runner = engine._runner
    layers = engine.family.decoder.layers
    sequences = [Sequence(prompt, engine._cache.allocate(len(prompt.ids) + 4)) for _ in range(3)]
    for sequence in sequences:
        runner.prefill(sequence, engine._image_features.of(prompt))
    if engine._ops.records_graphs:
        launches.clear()
        runner.decode(sequences, [1, 2, 3])
        updates = layers if engine._ops.kernels.lengths == "list" else 0
        replayed = [launch for launch in launches.names() if launch != SEED]
        assert replayed[0] == "graph replay"
        assert sum("FusedInfer" in launch for launch in replayed) == updates
    runner.graphs = None
    launches.clear()
    runner.decode(sequences, [1, 2, 3])
    kernel_by_kernel = launches.names()
    assert "graph replay" not in kernel_by_kernel
    if not aclop_matmuls(engine._ops):
        assert not any("aclop" in launch for launch in kernel_by_kernel)


def test_storage_formats(tmp_path, ops):
    import torch_npu

    decoder = full_size("glm-4-9b-chat", tmp_path, ops)
    cache = KVCache(decoder.config, 2, ops.default_block_size, torch.float16, "npu:0", ops)
    tensors = [decoder.layers[0].qkv.weight, decoder.lm_head.weight, *cache.layers[0]]
    wanted = NZ if CHIP.startswith("Ascend310P") else 2
    assert [int(torch_npu.get_npu_format(tensor)) for tensor in tensors][:2] == [wanted] * 2
    assert all((int(torch_npu.get_npu_format(t)) == NZ) == (wanted == NZ) for t in cache.layers[0])


@pytest.fixture
def team(ops, tmp_path):
    """A group of one device over the wheel's hccl."""
    team = Team(0, 1, b"secret", FileStore(str(tmp_path / "store"), 1))
    team.connect("npu:0")
    yield team
    ops.team = None
    leave()


def test_collectives_are_all_that_the_launches_gain(tmp_path, ops, launches, team):
    decoder = full_size("glm-4-9b-chat", tmp_path, ops)
    with torch.inference_mode():
        for lengths in STEPS.values():
            ops.team = None
            run_step(decoder, *lengths, launches)
            alone = run_step(decoder, *lengths, launches)
            ops.team = team
            together = run_step(decoder, *lengths, launches)
            assert [name for name in together if not name.startswith("hccl")] == alone
            assert together.count("hccl AllReduce") == 2 * decoder.config.layers
            assert together.count("hccl AllGather") == 1


def test_collectives_inside_recorded_graphs(tmp_path, ops, launches, team):
    if not ops.records_graphs:
        pytest.skip("no graphs are recorded with this set")
    decoder = full_size("glm-4-9b-chat", tmp_path, ops)
    cache = KVCache(decoder.config, 3, ops.default_block_size, torch.float16, "npu:0", ops)
    ops.team = team
    graphs = DecodeGraphs(decoder, cache, WIDTH, "npu:0")
    launches.clear()
    graphs.record()
    passes = 2 * len(BATCH_SIZES)  # warm-up and recording
    assert launches.names().count("hccl AllReduce") == passes * 2 * decoder.config.layers
