"""The decode step's own kernels against torch's operators; skipped where the CPU or a compiler is
missing."""

import json
import os
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from models.checkpoint.quantized import Quantized
from models.config import DecoderConfig, Rope
from models.network.decoder import NORMS, POST_NORMS, Decoder, Step
from models.network.linear import Linear, Norm
from runtime.common.files import file_entry
from runtime.common.notes import notes_on_stderr
from runtime.engine.kv_cache import KVCache
from runtime.ops.cpu import native, native_library
from runtime.ops.cpu.ops import CpuOps
from runtime.ops.cpu.packed_weights import FloatWeight, Int4Weight, Int8Weight, TorchInt4
from runtime.ops.reference import ReferenceOps

pytestmark = pytest.mark.skipif(
    native_library.kernels() is None,
    reason=native_library.missing() or "the kernels cannot be built",
)
OPS = CpuOps()
PLAIN = ReferenceOps()
ROUNDED = {"rtol": 0.008, "atol": 0.001}  # the last of bfloat16's 8 bits


def gaussian(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture
def without(monkeypatch):
    """Calls a function with torch's operators alone."""

    def call(function, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(native, "SMALL_BATCH", 0)
            return function(*arguments)

    return call


@pytest.fixture(scope="module", params=["as it is", "without AMX"])
def instructions(request, tmp_path_factory):
    """The kernels as other CPUs of this kind get them."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "without AMX":
            patch.setenv("ASCEND_VLM_CACHE", str(tmp_path_factory.mktemp("kernels")))
            patch.setattr(
                native_library,
                "COMMAND",
                (*native_library.COMMAND, "-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"),
            )
            native_library.kernels.cache_clear()
        assert native_library.kernels()
        yield
    native_library.kernels.cache_clear()


@pytest.mark.parametrize("rows", range(1, native.SMALL_BATCH + 1))
@pytest.mark.parametrize("shape", [(64, 128), (96, 384), (304, 256), (2048, 6144)])
def test_products(instructions, rows, shape, without):
    weight = 0.05 * gaussian(*shape)
    x = gaussian(rows, shape[1], seed=1)
    bias = gaussian(shape[0], seed=2)
    for form in (FloatWeight(weight), Int8Weight.from_tensors(Int8Weight.tensors(weight))):
        assert form._blocks, "oneDNN's order of the weights is not known"
        for b in (None, bias, None):
            torch.testing.assert_close(form(x, b), without(form, x, b), rtol=0.02, atol=0.02)
    exact = FloatWeight(weight)(x, None).float()
    torch.testing.assert_close(exact, x.float() @ weight.float().T, rtol=0.008, atol=0.01)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 17, 31, 33])
@pytest.mark.parametrize("shape", [(64, 128), (48, 256), (1072, 384)])
def test_int4_products(rows, shape):
    weight = 0.05 * gaussian(*shape)
    x = gaussian(rows, shape[1], seed=1)
    stored = Int4Weight.tensors(weight)
    ours = Int4Weight.from_tensors(stored)
    theirs = TorchInt4(stored["int4"], stored["scales"])
    groups = x.float().unflatten(1, (-1, 128))
    scale = groups.abs().amax(-1, keepdim=True) / 127
    rounded = ((groups / scale).round() * scale).flatten(1)
    weight = dequantised(stored)
    if rows >= ours._large_batch:
        rounded = x.float()
        weight = weight.bfloat16().float()
    torch.testing.assert_close(ours(x, None).float(), rounded @ weight.T, rtol=0.008, atol=0.002)
    torch.testing.assert_close(ours(x, None), theirs.linear(x), rtol=0.02, atol=0.05)
    torch.testing.assert_close(
        ours._form.floats(0, shape[0]).float(), dequantised(stored), rtol=0.008, atol=1e-4
    )


def dequantised(stored):
    q = (
        torch.stack((stored["int4"] & 15, stored["int4"] >> 4), -1)
        .flatten(1)
        .float()
        .unflatten(1, (-1, 128))
        - 8
    )
    scale, zero = stored["scales"].float().transpose(0, 1).unbind(-1)
    return (q * scale[..., None] + zero[..., None]).flatten(1)


@pytest.mark.parametrize("kind, offset", [("W8A8", -13), ("W8A8", 0), ("W8A8_DYNAMIC", 0)])
def test_quantised_layers_are_exact(kind, offset):
    """The same whole numbers: what differs is one rounding to bfloat16. One layer computes few
    tokens and many in turn."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (192, 256), dtype=torch.int8, generator=generator)
    bias = torch.randint(-9999, 9999, (192,), dtype=torch.int32, generator=generator)
    layer = Quantized(
        kind, weight, torch.rand(192, generator=generator) / 1000, bias, 0.031, offset
    )
    if kind == "W8A8_DYNAMIC":
        layer.bias = bias.float() / 1000
    packed = OPS.pack_quantized(layer, torch.bfloat16)
    for rows in (70, 1, 3, 8, 70, 1):
        x = gaussian(rows, 256, seed=rows)
        x[-1] = 0
        torch.testing.assert_close(
            OPS.quantized_linear(x, packed), PLAIN.quantized_linear(x, layer), rtol=0.008, atol=1e-6
        )


@pytest.mark.parametrize("rows", [1, 4, 70])
def test_between_the_products(rows):
    x = gaussian(rows, 192)
    residual = gaussian(rows, 192, seed=1)
    norm = Norm(gaussian(192, seed=2))
    for found, expected in zip(
        OPS.add_rms_norm(x, residual, norm, 1e-5), PLAIN.add_rms_norm(x, residual, norm, 1e-5)
    ):
        torch.testing.assert_close(found, expected, **ROUNDED)
    torch.testing.assert_close(
        OPS.rms_norm(x, norm, 1e-5), PLAIN.rms_norm(x, norm, 1e-5), **ROUNDED
    )
    for bias in (gaussian(192, seed=3), gaussian(192, seed=3).float()):
        shifting = Norm(norm.weight, bias)
        torch.testing.assert_close(
            OPS.rms_norm(x, shifting, 1e-5), PLAIN.rms_norm(x, shifting, 1e-5), **ROUNDED
        )
    gates = torch.cat((40 * x, residual), -1)
    torch.testing.assert_close(
        OPS.swiglu(gates).float(), F.silu(40 * x.float()) * residual.float(), rtol=0.02, atol=0.001
    )


@pytest.mark.parametrize("rows", [1, 70])
def test_rotated_qkv(rows):
    config = DecoderConfig(8, 256, 1, 4, 2, 64, 8, Rope(64), 1e-5, 512)
    angles = gaussian(rows, 32, seed=1).float()
    qkv = gaussian(rows, 8 * 64)
    cos, sin = (torch.cat((t, t), -1).bfloat16() for t in (angles.cos(), angles.sin()))
    step = Step(cos, sin, torch.arange(rows), torch.zeros(1, 9, dtype=torch.int32), [rows], [rows])
    expected = PLAIN.rotated_qkv(qkv.clone(), config, step)
    for a, b in zip(OPS.rotated_qkv(qkv, config, OPS.begin(step, config, "cpu")), expected):
        torch.testing.assert_close(a, b, rtol=0.016, atol=0.016)


@pytest.mark.parametrize(
    "heads, kv_heads, d", [(4, 4, 32), (16, 4, 128), (32, 2, 64), (6, 2, 96), (5, 1, 64)]
)
@pytest.mark.parametrize("lengths", [[1], [37], [16, 1, 130], [5] * 8])
def test_attention(heads, kv_heads, d, lengths):
    """Blocks in any order; what is in the cache afterwards, too."""
    config = DecoderConfig(8, heads * d, 1, heads, kv_heads, d, 8, Rope(d), 1e-5, 512)
    rows = len(lengths)
    block = 16
    generator = torch.Generator().manual_seed(3)
    width = -(-max(lengths) // block)
    table = torch.randperm(rows * width, generator=generator).view(rows, width).int()
    last = torch.tensor(lengths) - 1
    slots = table[torch.arange(rows), last // block].long() * block + last % block
    angles = gaussian(rows, d // 2, seed=4).float()
    cos, sin = (torch.cat((t, t), -1).bfloat16() for t in (angles.cos(), angles.sin()))
    step = Step(cos, sin, slots, table, [1] * rows, lengths)
    qkv = gaussian(rows, (heads + 2 * kv_heads) * d)
    caches = [gaussian(rows * width, block, kv_heads, d, seed=5 + i) for i in range(2)]
    ours, theirs = ([cache.clone() for cache in caches] for _ in range(2))
    begun = OPS.begin(step, config, "cpu")
    found = OPS.attend(qkv, *ours, config, begun)
    assert begun.native_step
    expected = PLAIN.attend(qkv, *theirs, config, PLAIN.begin(step, config, "cpu"))
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=0.016, atol=0.016)


def decoder_of(kind, shifted, post_norms=False):
    """Two layers with random weights, its cache, and the step of three sequences."""
    config = DecoderConfig(128, 256, 2, 4, 2, 64, 384, Rope(64), 1e-5, 512, post_norms=post_norms)
    sizes = {"qkv": (512, 256), "out": (256, 256), "up": (768, 256), "down": (256, 384)}
    weights = {
        "embed.weight": gaussian(128, 256),
        "lm_head.weight": OPS.pack(gaussian(128, 256)),
        "final_norm.weight": gaussian(256),
    }
    for i in range(config.layers):
        for j, (name, shape) in enumerate(sizes.items()):
            weight = 0.05 * gaussian(*shape, seed=4 * i + j)
            target = f"layers.{i}.{name}"
            weights[f"{target}.weight"] = {
                "float": OPS.pack,
                "int8": lambda w: packed(Int8Weight, w),
                "int4": lambda w: packed(Int4Weight, w),
            }[kind](weight)
            weights[f"{target}.bias"] = gaussian(shape[0], seed=j) if name == "qkv" else None
        for j, name in enumerate(NORMS + POST_NORMS if post_norms else NORMS):
            weights[f"layers.{i}.{name}.weight"] = gaussian(256, seed=4 * i + j)
            weights[f"layers.{i}.{name}.bias"] = gaussian(256, seed=9) if shifted else None
    decoder = Decoder(config, weights, CpuOps())
    cache = KVCache(config, 9, 16, torch.bfloat16, "cpu", OPS)
    for pair in cache.layers:
        for i, tensor in enumerate(pair):
            tensor.copy_(gaussian(*tensor.shape, seed=i))
    cos, sin = decoder.angles(torch.tensor([[0], [20], [47]]))
    table = torch.tensor([[3, 0, 0], [7, 1, 0], [2, 8, 4]], dtype=torch.int32)
    return decoder, cache, Step(cos, sin, torch.tensor([48, 20, 79]), table, [1] * 3, [1, 21, 48])


def packed(form, weight):
    return form.from_tensors(form.tensors(weight))


@pytest.mark.parametrize("post_norms", [False, True])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("kind", ["float", "int8", "int4"])
def test_all_layers_at_once_are_the_layers_one_by_one(kind, shifted, post_norms):
    decoder, cache, step = decoder_of(kind, shifted, post_norms)
    x = gaussian(3, 256)
    before = [[t.clone() for t in pair] for pair in cache.layers]

    def begun():
        return decoder.ops.begin(step, decoder.config, "cpu")

    found = decoder.forward(x, begun(), cache)
    written = [t.clone() for pair in cache.layers for t in pair]
    assert decoder.ops._native_layers and torch.equal(x, gaussian(3, 256))
    for pair, old in zip(cache.layers, before):
        for tensor, value in zip(pair, old):
            tensor.copy_(value)
    decoder.tap = lambda stage, values: values  # what is watched goes layer by layer
    assert torch.equal(decoder.forward(x, begun(), cache), found)
    assert all(map(torch.equal, written, (t for pair in cache.layers for t in pair)))
    decoder.tap = None
    decoder.layers[1] = decoder.layers[0]  # what is put into the list is what runs
    changed = decoder.forward(x, begun(), cache)
    assert not torch.allclose(changed, found, atol=0.1)


def test_layers_of_which_torch_computes_one_go_one_by_one():
    decoder, cache, step = decoder_of("float", shifted=False)
    decoder.layers[1] = replace(decoder.layers[1], down=Linear(gaussian(256, 384)))
    decoder.forward(gaussian(3, 256), decoder.ops.begin(step, decoder.config, "cpu"), cache)
    assert decoder.ops._built_from and decoder.ops._native_layers is None


def test_without_a_compiler_torch_does_everything(monkeypatch):
    monkeypatch.setattr("runtime.ops.cpu.native_library.shutil.which", lambda name: None)
    assert "there is no C compiler; run: apt-get install gcc" in OPS.remark(
        torch.bfloat16
    ) and not OPS.remark(torch.float32)
    native_library.kernels.cache_clear()
    try:
        weight = gaussian(64, 128)
        x = gaussian(1, 128, seed=1)
        packed = FloatWeight(weight)
        assert (
            native_library.kernels() is None and not packed._blocks and not native.is_small_batch(x)
        )
        torch.testing.assert_close(packed(x, None), F.linear(x, weight), **ROUNDED)
    finally:
        monkeypatch.undo()
        native_library.kernels.cache_clear()


def test_built_once_per_machine_and_again_when_the_compiler_fails(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("ASCEND_VLM_CACHE", str(tmp_path))
    native_library.load_library()
    built = native_library.library_path()
    first = built.stat().st_mtime_ns
    files = {built, built.with_suffix(".json")}
    native_library.load_library()
    assert built.stat().st_mtime_ns == first
    assert set((tmp_path / "kernels").iterdir()) == files
    monkeypatch.setattr(native_library, "COMMAND", ("-no-such-option",))
    native_library.kernels.cache_clear()
    try:
        with notes_on_stderr():
            assert native_library.kernels() is None
        assert "warning: decoding is slower" in capsys.readouterr().err
        assert set((tmp_path / "kernels").iterdir()) == files
    finally:
        monkeypatch.undo()
        native_library.kernels.cache_clear()


EVIL = """
#include <stdio.h>
#include <stdlib.h>
__attribute__((constructor)) static void go(void) { fclose(fopen(getenv("MARK"), "w")); }
"""


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A library that leaves a mark when it is loaded; the mark."""
    (tmp_path / "evil.c").write_text(EVIL)
    command = ["cc", "-shared", "-fPIC", "-o", tmp_path / "evil.so", tmp_path / "evil.c"]
    subprocess.run(command, check=True)
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("ASCEND_VLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "evil.so", tmp_path / "mark"


def plant(evil, library, mode=0o755):
    """Puts the library where ours belongs, with a record that fits it."""
    library.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    library.unlink(missing_ok=True)
    shutil.copy(evil, library)
    library.chmod(mode)
    record = library.with_suffix(".json")
    record.write_text(json.dumps(file_entry(library)))
    record.chmod(0o644)


def test_a_library_in_a_folder_that_others_may_write_is_not_loaded(evil, tmp_path, capsys):
    library, mark = evil
    plant(library, native_library.library_path())
    (tmp_path / "cache").chmod(0o1777)
    with notes_on_stderr():
        assert native_library.load_library()
    assert not mark.exists() and native_library.library_path().parent == (
        tmp_path / "home" / ".cache" / "ascend-vlm" / "kernels"
    )
    assert "may be written by others" in capsys.readouterr().err


def test_a_library_that_others_may_write_is_compiled_again(evil, capsys):
    library, mark = evil
    plant(library, native_library.library_path(), mode=0o777)
    with notes_on_stderr():
        assert native_library.load_library()
    assert not mark.exists() and "compiling the CPU's kernels again" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("suffix", [".so", ".json"])
def test_a_library_of_somebody_else_is_compiled_again(evil, suffix):
    library, mark = evil
    path = native_library.library_path()
    plant(library, path)
    os.chown(path.with_suffix(suffix), 65534, 65534)
    assert native_library.load_library() and not mark.exists()


@pytest.mark.parametrize(
    "damage", ["replaced", "truncated", "no record", "a link", "half a record"]
)
def test_a_damaged_library_is_compiled_again(evil, damage, capsys):
    library, mark = evil
    native_library.load_library()
    path = native_library.library_path()
    whole = path.read_bytes()
    if damage == "replaced":
        shutil.copy(library, path)
    elif damage == "truncated":
        os.truncate(path, 5000)
    elif damage == "no record":
        shutil.copy(library, path)
        path.with_suffix(".json").unlink()
    elif damage == "a link":
        path.unlink()
        path.symlink_to(library)
    else:
        os.truncate(path.with_suffix(".json"), 5)
    with notes_on_stderr():
        assert native_library.load_library().matmul
    assert not mark.exists() and len(path.read_bytes()) == len(whole)
    assert capsys.readouterr().err.count("compiling the CPU's kernels again") == 1
