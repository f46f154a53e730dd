"""Which part of a decoder each device holds: weights, plan, refusals, and where the NPU operators'
collectives stand."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import cpu_kernels
import paths
import pytest
import torch
from damaged_checkpoints import edited
from torch.utils._python_dispatch import TorchDispatchMode

from models import family_of
from models.checkpoint import Checkpoint
from models.checkpoint.quantized import Description, quantized_weights
from models.checkpoint.table import Part, Weight
from models.network.decoder import Decoder, Step
from models.network.linear import Stacked
from quant.integer_layer import MemoryCheckpoint
from runtime.ascend.socs import A2, P310
from runtime.common.errors import ToolkitError
from runtime.engine.kv_cache import KVCache
from runtime.engine.loading.cpu_weights import packed_weights
from runtime.engine.loading.memory import make_plan
from runtime.engine.loading.weights import decoder_weights, load_rows
from runtime.ops.npu.ops import NpuOps
from runtime.ops.reference import ReferenceOps
from runtime.parallel.split import Split, check_split

GOLDEN = paths.GOLDEN
FAMILIES = ("visualglm", "glm4", "llava")
SPLITS = [
    (name, size)
    for name in (*FAMILIES, "glm_edge", "glm4v", "glm4/hf", "glm_ocr", "glm41v", "glm46v")
    for size in (2, 4)
] + [("glm4_0414", 2)]  # its 6 heads are not for 4
MATRICES = ("qkv.weight", "out.weight", "up.weight", "down.weight")


# weights


class Sum:
    """Stands in for a team inside one process: remembers what would be summed or gathered."""

    def __init__(self):
        self.calls = Counter()

    def all_reduce(self, x):
        self.calls["all_reduce"] += 1
        return x

    def gather(self, x):
        self.calls["gather"] += 1
        return x


def loaded(family, split):
    checkpoint = Checkpoint(family.directory)
    return decoder_weights(checkpoint, family, torch.float32, "cpu", ReferenceOps(), split)


@pytest.mark.parametrize("name, size", SPLITS)
def test_weights_of_all_ranks_are_those_of_one(name, size):
    """Products of the parts, summed or laid side by side, are the product of the whole."""
    family = family_of(GOLDEN / name)
    whole = loaded(family, Split(family.decoder))
    parts = [loaded(family, Split(family.decoder, size, r)) for r in range(size)]
    assert torch.equal(torch.cat([p["lm_head.weight"] for p in parts]), whole["lm_head.weight"])
    for layer in range(family.decoder.layers):
        for kind in ("out", "down"):
            name = f"layers.{layer}.{kind}"
            assert torch.equal(
                torch.cat([p[name + ".weight"] for p in parts], 1), whole[name + ".weight"]
            )
            assert [name + ".bias" in p for p in parts] == [name + ".bias" in whole] + [False] * (
                size - 1
            )
    c = family.decoder
    d = family.decoder.head_dim
    q, k, v = whole["layers.0.qkv.weight"].split([c.heads * d, c.kv_heads * d, c.kv_heads * d])
    for rank, part in enumerate(parts):
        local = Split(c, size, rank).config
        mine = part["layers.0.qkv.weight"].split(
            [local.heads * d, local.kv_heads * d, local.kv_heads * d]
        )
        head = (
            rank * c.heads // size * c.kv_heads // c.heads
        )  # key/value head that this rank's first query uses
        rows = slice(head * d, (head + local.kv_heads) * d)
        assert (
            torch.equal(mine[0], q.chunk(size)[rank])
            and torch.equal(mine[1], k[rows])
            and torch.equal(mine[2], v[rows])
        )


def quantised(family, kind, split):
    """Every linear layer of `kind` with random tensors, loaded as one rank loads it."""
    kinds = {
        row.source: kind
        for row in family.weights()
        if row.parts and str(row.target).endswith(MATRICES)
    }
    table = list(quantized_weights(family.weights(), Description(Path("a test"), kind, kinds)))
    random = torch.Generator().manual_seed(0)
    tensors = {
        row.source: torch.randint(1, 100, row.shape, generator=random, dtype=torch.int32)
        for row in table
    }
    tensors = {
        n: t.to(
            {"weight": torch.int8, "deq_scale": torch.int64}.get(n.rpartition(".")[2], torch.int32)
        )
        if n.removesuffix(n.rpartition(".")[2]) + "weight" in kinds
        else t.float()
        for n, t in tensors.items()
    }
    tensors |= {n: torch.zeros_like(t) for n, t in tensors.items() if n.endswith("weight_offset")}
    rows = [row for row in split.weights(table) if row.parts and row.target.is_piece]
    return load_rows(MemoryCheckpoint(tensors), rows, torch.float32, "cpu", ReferenceOps())


@pytest.mark.parametrize("name, size", SPLITS)
@pytest.mark.parametrize("kind", ["W8A8", "W8A8_DYNAMIC"])
def test_quantised_weights_of_all_ranks_are_those_of_one(name, kind, size):
    """Rows with their scales and biases; quant_bias of a sum over devices on the first one only."""
    family = family_of(GOLDEN / name)
    c = family.decoder
    d = family.decoder.head_dim
    whole = quantised(family, kind, Split(c))
    parts = [quantised(family, kind, Split(c, size, rank)) for rank in range(size)]
    for layer in ("layers.0.out", f"layers.{c.layers - 1}.down"):
        one = flat(whole[layer])
        all_ = [flat(part[layer]) for part in parts]
        assert torch.equal(torch.cat([part.weight for part in all_], 1), one.weight)
        assert all(
            torch.equal(part.scale, one.scale) and part.input_scale == one.input_scale
            for part in all_
        )
        if one.static:
            assert [part.bias.any().item() for part in all_] == [True] + [False] * (size - 1)
        assert one.bias is None or torch.equal(all_[0].bias, one.bias)
    halves = 2 if c.activation == "swiglu" else 1
    for tensor in ("weight", "scale", "bias"):
        one, up = (getattr(flat(whole[f"layers.0.{layer}"]), tensor) for layer in ("qkv", "up"))
        if one is None:
            continue
        q, k, v = one.split([c.heads * d, c.kv_heads * d, c.kv_heads * d])
        for rank, part in enumerate(parts):
            head = rank * c.heads // size * c.kv_heads // c.heads
            local = Split(c, size, rank).config
            rows = slice(head * d, (head + local.kv_heads) * d)
            mine = getattr(flat(part["layers.0.qkv"]), tensor)
            assert torch.equal(mine, torch.cat((q.chunk(size)[rank], k[rows], v[rows])))
            if up is not None:
                mine = getattr(flat(part["layers.0.up"]), tensor)
                assert torch.equal(
                    mine, torch.cat([half.chunk(size)[rank] for half in up.chunk(halves)])
                )


def flat(layer):
    """Layers that stayed apart because their scales differ, as one (of the first one's scales)."""
    if not isinstance(layer, Stacked):
        return layer
    together = {
        name: torch.cat([getattr(part, name) for part in layer.parts])
        for name in ("weight", "scale", "bias")
        if layer.parts[0].bias is not None or name != "bias"
    }
    return replace(layer.parts[0], **together)


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_vocabulary_that_does_not_divide_is_filled_up_with_zeros(
    kind, size, tmp_path, monkeypatch
):
    """The last device's share is as large as the others'; the plan counts it."""
    monkeypatch.setenv("ASCEND_VLM_CACHE", str(tmp_path / "cache"))

    def grow(tensors):
        for name in ("embedding.word_embeddings", "output_layer"):
            matrix = tensors[f"transformer.{name}.weight"]
            tensors[f"transformer.{name}.weight"] = torch.cat((matrix, matrix[:1]))

    family = family_of(
        edited(GOLDEN / "glm4", tmp_path, grow, lambda c: c.update(padded_vocab_size=321))
    )
    whole = loaded(family, Split(family.decoder))["lm_head.weight"]
    heads = []
    for rank in range(size):
        split = Split(family.decoder, size, rank)
        if kind == "float":
            heads.append(loaded(family, split)["lm_head.weight"])
        else:
            weights = packed_weights(
                Checkpoint(family.directory), family, torch.float32, kind, split
            )
            identity = torch.eye(family.decoder.hidden)
            heads.append(weights["lm_head.weight"](identity, None).T)
    rows = -(-321 // size)
    assert [len(head) for head in heads] == [rows] * size
    together = torch.cat(heads)
    torch.testing.assert_close(together[:321], whole, atol=0 if kind == "float" else 0.01, rtol=0)
    assert not together[321:].any()
    if kind == "float":
        first = loaded(family, Split(family.decoder, size))
        planned = make_plan(family, "float32", 128, size).weights
        assert planned == sum(tensor.nbytes for tensor in first.values())


@pytest.mark.parametrize("name", ["visualglm", "glm4", "llava", "glm_edge"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_plan_counts_what_the_first_device_loads(name, size):
    family = family_of(GOLDEN / name)
    split = Split(family.decoder, size)
    plan = make_plan(family, "float32", 128, size)
    assert plan.weights == sum(tensor.nbytes for tensor in loaded(family, split).values())
    cache = KVCache(split.config, 8, 16, torch.float32, "cpu", ReferenceOps())
    assert plan.cache == sum(tensor.nbytes for pair in cache.layers for tensor in pair)


def test_a_rank_reads_only_its_rows(monkeypatch):
    family = family_of(GOLDEN / "llava")
    read = Counter()
    checkpoint = Checkpoint(family.directory)
    plain = checkpoint._reader.tensor
    monkeypatch.setattr(
        checkpoint._reader,
        "tensor",
        lambda name, entry: (
            read.update({name.split("model.")[-1]: entry.nbytes}) or plain(name, entry)
        ),
    )
    decoder_weights(
        checkpoint, family, torch.float32, "cpu", ReferenceOps(), Split(family.decoder, 4, 3)
    )
    sizes = {name.split("model.")[-1]: checkpoint.nbytes(name) for name in checkpoint.names}
    narrowed = {
        name
        for name in read
        if name.endswith(("q_proj.weight", "gate_proj.weight", "lm_head.weight"))
    }
    assert len(narrowed) == 2 * family.decoder.layers + 1
    assert all(read[name] * 4 == sizes[name] for name in narrowed)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_rows_of_a_tensor_that_many_parts_take(tmp_path, suffix):
    tensor = torch.arange(24.0).view(6, 4)
    if suffix == ".bin":
        torch.save({"x": tensor}, tmp_path / "pytorch_model.bin")
    else:
        from safetensors.torch import save_file

        save_file({"other": torch.ones(3), "x": tensor}, tmp_path / "model.safetensors")
    parts = (
        Part("a", take=(1, 3)),
        Part("b", take=(4, 6), at=(0, 4)),
        Part("b", take=(0, 2), at=(2, 4)),
    )
    table = [Weight("x", (6, 4), parts)]
    counted = []
    found = dict(
        Checkpoint(tmp_path).assemble(table, progress=lambda *bytes_: counted.append(bytes_))
    )
    assert torch.equal(found["a"], tensor[1:3]) and torch.equal(
        found["b"], torch.cat((tensor[4:], tensor[:2]))
    )
    assert counted[-1] == (96, 96)


# what cannot be split


@pytest.mark.parametrize(
    "changes, size, wrong",
    [
        ({"heads": 6}, 4, "6 attention heads"),
        ({"ffn": 98}, 4, "98 feed-forward channels"),
        ({"vocab_size": 3}, 4, "3 vocabulary rows"),
        ({"heads": 24, "kv_heads": 6}, 4, "6 key/value heads"),
    ],
)
def test_refusals(changes, size, wrong):
    family = family_of(GOLDEN / "glm4")
    family.decoder = replace(family.decoder, **changes)
    with pytest.raises(
        ToolkitError, match=f"--tensor-parallel-size {size} does not divide glm-4's {wrong}; use 1"
    ):
        check_split(family, size)


# the places of the collectives on the NPU operators


class Launched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def one_token(family, soc, team):
    cpu_kernels.declare()
    size = 2 if team else 1
    ops = NpuOps(soc, "cpu")
    split = Split(family.decoder, size)
    ops.team = team
    weights = decoder_weights(
        Checkpoint(family.directory), family, torch.float32, "cpu", ops, split
    )
    decoder = Decoder(split.config, weights, ops)
    cache = KVCache(split.config, 2, 16, torch.float32, "cpu", ops)
    turn = torch.zeros(1, split.config.head_dim)
    table = torch.tensor([[0]], dtype=torch.int32)
    step = ops.begin(Step(turn, turn, torch.tensor([0]), table, [1], [1]), split.config, "cpu")
    with torch.inference_mode(), Launched() as launched:
        decoder.logits(decoder.forward(decoder.embed(torch.tensor([3])), step, cache))
    return launched.names


@pytest.mark.parametrize("soc", [A2, P310], ids=lambda soc: soc.name.split()[1])
@pytest.mark.parametrize("name", FAMILIES)
def test_collectives_are_all_that_the_launches_gain(name, soc):
    family = family_of(GOLDEN / name)
    team = Sum()
    cpu_kernels.stand_in_for(soc)
    soc = replace(soc, dtypes=("float32",), swiglu_multiple=2)  # half of a tiny layer is no 32
    assert one_token(family, soc, team) == one_token(family, soc, None)
    assert team.calls == {"all_reduce": 2 * family.decoder.layers, "gather": 1}
