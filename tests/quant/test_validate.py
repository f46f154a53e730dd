"""`python -m quant validate`: good directories, each loaded by whom it should be, and damaged ones,
each with its reason."""

import json
import os
import re
import shutil
from pathlib import Path

import paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from models import family_of
from models.checkpoint import Checkpoint
from models.checkpoint.quantized import check_stored, find_description, halves_of, stored_weights
from quant.__main__ import main
from quant.validate.findings import A2, CONSUMERS, MINDIE, P310
from quant.validate.folder import validate
from runtime.common.errors import ToolkitError
from runtime.common.files import check_checksums, write_checksums

GOLDEN = paths.GOLDEN / "msmodelslim"
LAYER = "model.layers.0.self_attn.o_proj"


class Folder:
    """A quantised directory to change: `tensors`, `description`, `config`; write() stores them."""

    def __init__(self, path, case):
        self.path = Path(shutil.copytree(GOLDEN / case, path / case))
        (self.file,) = self.path.glob("*.safetensors")
        self.tensors = load_file(self.file)
        self.name = "quant_model_description.json"
        self.description = json.loads((self.path / self.name).read_text())
        self.config = json.loads((self.path / "config.json").read_text())

    def write(self):
        """As `python -m quant` writes it: with the names of the halves of gate_up_proj."""
        self.description |= halves_of(self.description)
        save_file({n: t.contiguous() for n, t in self.tensors.items()}, self.file)
        (self.path / "quant_model_description.json").unlink(missing_ok=True)
        (self.path / self.name).write_text(json.dumps(self.description))
        (self.path / "config.json").write_text(json.dumps(self.config))
        return validate(self.path)

    def rename_kind(self, old, new):
        self.description = {n: new if kind == old else kind for n, kind in self.description.items()}
        self.config["quantize"] = new.lower()

    def add(self, name, tensor, kind):
        self.tensors[name] = tensor
        self.description[name] = kind

    def drop(self, name):
        del self.tensors[name], self.description[name]


@pytest.fixture
def folder(tmp_path):
    return lambda case="glm_f16_w8a8": Folder(tmp_path, case)


# good directories


@pytest.mark.parametrize(
    "case, loads",
    [
        ("glm_f16_w8a8", CONSUMERS),
        ("glm_f16_w8a8_m4", CONSUMERS),
        ("llama_f16_w8a8_m4", CONSUMERS),
        ("glm_f16_cli_v1_w8a8_static", CONSUMERS),
        ("glm_bf16_w8a8", (MINDIE, A2)),
        ("glm_f16_w8a8s", (MINDIE, P310)),
        ("glm_f16_w8a8_dynamic", (MINDIE, A2)),
    ],
)
def test_golden_directories(case, loads, folder):
    found = folder(case).write()
    assert tuple(c for c in CONSUMERS if found.loads(c)) == loads and not found.problems


@pytest.mark.parametrize("case", ["glm_f16_w8a8", "glm_bf16_w8a8", "glm_f16_w8a8_dynamic"])
def test_halves_that_vllm_ascend_looks_up(case, folder):
    """msmodelslim describes gate_up_proj alone: KeyError in vllm-ascend's reader."""
    raw = validate(GOLDEN / case)
    assert raw.loads(MINDIE) and not raw.loads(A2) and not raw.loads(P310) and not raw.problems
    assert any("model.layers.0.mlp.gate_proj.weight" in finding.text for finding in raw.found)
    f = folder(case)
    assert f.write().loads(A2)
    assert not any("are described but not stored" in finding.text for finding in f.write().found)
    f.description["model.layers.1.mlp.up_proj.weight"] = "FLOAT"
    (f.path / f.name).write_text(json.dumps(f.description))
    found = validate(f.path)
    assert not found.loads(A2) and found.loads(MINDIE)
    assert any("1 names of halves" in finding.text for finding in found.found)
    Checkpoint(f.path).check(stored_weights(family_of(f.path)))
    check_stored(find_description(f.path), Checkpoint(f.path))


def weight_only(f):
    f.rename_kind("W8A8_DYNAMIC", "W8A16")


def float_layer(f):
    """One layer left float, as disable_names leaves it."""
    weight = f.tensors[LAYER + ".weight"].half()
    for name in [name for name in f.tensors if name.startswith(LAYER)]:
        f.drop(name)
    f.add(LAYER + ".weight", weight, "FLOAT")


def shards(f):
    """Two shards and an index."""
    names = sorted(f.tensors)
    first = f.file.with_name("quant_model_weight_w8a8-00001-of-00002.safetensors")
    second = f.file.with_name("quant_model_weight_w8a8-00002-of-00002.safetensors")
    parts = {first: names[:40], second: names[40:]}
    for file, members in parts.items():
        save_file({n: f.tensors[n] for n in members}, file)
    f.write()
    f.file.unlink()
    index = {
        "metadata": {},
        "weight_map": {n: file.name for file, members in parts.items() for n in members},
    }
    (f.path / "quant_model_weight_w8a8.safetensors.index.json").write_text(json.dumps(index))
    f.write = lambda: validate(f.path)


def without_weight_scale(f):
    for name in [name for name in f.tensors if name.endswith(("weight_scale", "weight_offset"))]:
        f.drop(name)


def newer_config_spelling(f):
    f.config["dtype"] = f.config.pop("torch_dtype")


def sparse_compressed(f):
    """The layout of msmodelslim's Compressor: weight shortened, index and info beside it."""
    f.rename_kind("W8A8S", "W8A8SC")
    for name in [name for name in f.tensors if f.tensors[name].dtype == torch.int8]:
        layer, (n, k) = name.removesuffix(".weight"), f.tensors[name].shape
        f.tensors[name] = f.tensors[name].flatten()[: n * k * 3 // 4]
        f.add(
            layer + ".index",
            torch.zeros(-(-k // 256) * -(-n // 128) * 8, dtype=torch.int8),
            "W8A8SC",
        )
        f.add(layer + ".info", torch.tensor([8, 8, k, n, 1]), "W8A8SC")


@pytest.mark.parametrize(
    "case, change, loads",
    [
        ("glm_f16_w8a8_dynamic", weight_only, (MINDIE, A2)),
        ("glm_f16_w8a8", float_layer, CONSUMERS),
        ("glm_f16_w8a8", shards, CONSUMERS),
        ("glm_f16_w8a8", without_weight_scale, CONSUMERS),
        ("glm_f16_w8a8", newer_config_spelling, CONSUMERS),
    ],
)
def test_good_variations(case, change, loads, folder):
    f = folder(case)
    change(f)
    found = f.write()
    assert tuple(c for c in CONSUMERS if found.loads(c)) == loads, found.found


def test_compressed_sparse_layout(folder):
    f = folder("glm_f16_w8a8s")
    sparse_compressed(f)
    found = f.write()
    assert [c for c in CONSUMERS if found.loads(c)] == [MINDIE] and not found.problems, found.found


# damaged directories


def put(name, change):
    def apply(f):
        f.tensors[name] = change(f.tensors[name])

    return apply


def changed(name, index, value):
    def apply(f):
        f.tensors[name][index] = value

    return apply


def underflow(f):
    f.tensors[LAYER + ".deq_scale"].zero_()


def stray(f):
    save_file({"x": torch.zeros(1)}, f.path / "model.safetensors")


def set_config(**fields):
    return lambda f: f.config.update(fields)


def fused_disagree(f):
    weight = "model.layers.0.self_attn.k_proj"
    floats = f.tensors[weight + ".weight"].half()
    for name in [n for n in f.tensors if n.startswith(weight) and not n.endswith(".bias")]:
        f.drop(name)
    f.add(weight + ".weight", floats, "FLOAT")


def old_name(f):
    f.name = "quant_model_description_w8a8.json"


def old_name_without_quantize(f):
    old_name(f)
    del f.config["quantize"]


DAMAGE = {
    "deq_scale zero": (underflow, "deq_scale has values that are zero", CONSUMERS),
    "deq_scale infinite": (
        put(LAYER + ".deq_scale", lambda t: torch.full_like(t, 0x7F800000)),
        "not finite",
        CONSUMERS,
    ),
    "deq_scale float32": (
        put(LAYER + ".deq_scale", lambda t: t.float()),
        "float32 in a float16 model",
        (A2, P310),
    ),
    "one deq_scale": (
        put(LAYER + ".deq_scale", lambda t: t[:1].clone()),
        "does not fit|do not fit",
        CONSUMERS,
    ),
    "served as bf16": (
        set_config(torch_dtype="bfloat16", dtype="bfloat16"),
        "int64 in a bfloat16 model",
        CONSUMERS,
    ),
    "float32 config": (
        set_config(torch_dtype="float32", dtype="float32"),
        "gives float32 as torch_dtype",
        CONSUMERS,
    ),
    "quant_bias saturated": (
        changed(LAYER + ".quant_bias", 3, -(2**31)),
        "quant_bias is saturated",
        CONSUMERS,
    ),
    "input_scale zero": (
        changed(LAYER + ".input_scale", 0, 0),
        "input_scale is not one positive number",
        CONSUMERS,
    ),
    "input_offset": (changed(LAYER + ".input_offset", 0, 200), "input_offset is 200", CONSUMERS),
    "weight float": (
        put(LAYER + ".weight", lambda t: t.half()),
        "weight is torch.float16",
        CONSUMERS,
    ),
    "tensor missing": (lambda f: f.drop(LAYER + ".quant_bias"), "lacks quant_bias", CONSUMERS),
    "described only": (
        lambda f: f.description.update({"x.weight": "FLOAT"}),
        "described but not stored",
        CONSUMERS,
    ),
    "stored only": (
        lambda f: f.description.pop("model.norm.weight"),
        "stored but not described",
        CONSUMERS,
    ),
    "stray shard": (stray, "model.safetensors lies beside", CONSUMERS),
    "unknown kind": (lambda f: f.rename_kind("W8A8", "W3A3"), "known to no engine", CONSUMERS),
    "quantize differs": (
        set_config(quantize="w8a16"),
        "config.json says quantize 'w8a16'",
        (MINDIE,),
    ),
    "fused disagree": (fused_disagree, "differ in kind", (A2, P310)),
    "old name": (old_name, "vllm-ascend looks for", (A2, P310)),
    "old name, no quantize": (
        old_name_without_quantize,
        "has no quantize, from which MindIE",
        (MINDIE,),
    ),
    "names of no model": (
        lambda f: f.add("model.extra.weight", torch.zeros(2), "FLOAT"),
        "unknown:",
        CONSUMERS,
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_directories(damage, folder):
    change, message, stops = DAMAGE[damage]
    f = folder()
    change(f)
    found = f.write()
    fitting = [finding for finding in found.found if re.search(message, finding.text)]
    assert fitting and fitting[0].stops == stops, found.found


@pytest.mark.parametrize(
    "tensor, value, message",
    [
        ("weight_scale", 0, "weight_scale has values"),
        ("weight_scale", float("nan"), "weight_scale has values"),
        ("weight_offset", 3, "weight_offset is not zero"),
    ],
)
def test_damaged_rows_of_a_dynamic_layer(tensor, value, message, folder):
    f = folder("glm_f16_w8a8_dynamic")
    changed(f"{LAYER}.{tensor}", 5, value)(f)
    (found,) = f.write().problems
    assert message in found


def test_mixed_up_compressed_layout(folder):
    f = folder("glm_f16_w8a8s")
    sparse_compressed(f)
    f.tensors[LAYER + ".index"] = f.tensors[LAYER + ".index"][:8].clone()
    f.tensors[LAYER + ".info"] = f.tensors[LAYER + ".info"][:4].clone()
    f.tensors["model.layers.1.self_attn.o_proj.index"] = torch.zeros(3, dtype=torch.int8)
    texts = " ".join(f.write().problems)
    assert (
        f"{LAYER}.info is no list of five int64" in texts
        and "o_proj.index has 3 values of torch.int8, 256 x 256" in texts
    )


def test_sparse_in_bfloat16(folder):
    f = folder("glm_f16_w8a8s")
    f.config |= {"torch_dtype": "bfloat16", "dtype": "bfloat16"}
    assert any("W8A8S is for the 310P" in text for text in f.write().problems)


def test_saturating_sums(folder):
    f = folder()
    f.tensors[LAYER + ".quant_bias"][:] = 2**30 - 1
    assert not any("overflow" in text for text in f.write().problems)
    f.tensors[LAYER + ".weight"][:] = 127
    f.tensors[LAYER + ".quant_bias"][:] = 2**30
    assert any("saturated" in text for text in f.write().problems)


def test_half_precision_scales_are_a_note(folder):
    f = folder()
    one = f.tensors[LAYER + ".deq_scale"][0].item()
    f.tensors[LAYER + ".deq_scale"][:] = one
    found = f.write()
    assert any(
        "only 1 different values" in finding.text and not finding.stops for finding in found.found
    )
    assert not found.problems


def test_unreadable_for_others_is_a_note(folder):
    f = folder()
    f.write()
    os.chmod(f.file, 0o400)
    found = validate(f.path)
    assert any("chmod 644" in finding.text and not finding.stops for finding in found.found)


def test_truncated_download(folder):
    f = folder()
    f.file.write_bytes(f.file.read_bytes()[:-100])
    assert "is truncated" in validate(f.path).problems[0]


# the command


def test_command(capsys):
    assert main(["validate", str(GOLDEN / "glm_f16_w8a8s")]) == 0
    out = capsys.readouterr().out
    assert "MindIE-LLM: files fit" in out and "vllm-ascend on 910B: files do not fit" in out


def test_command_on_a_float_checkpoint(capsys):
    assert main(["validate", str(GOLDEN / "float" / "glm_f16")]) == 1
    assert "has no quant_model_description.json" in capsys.readouterr().out


def test_json(capsys):
    assert main(["validate", "--json", str(GOLDEN / "llama_f16_w8a8_m4")]) == 0
    assert json.loads(capsys.readouterr().out)["loads"] == dict.fromkeys(CONSUMERS, True)


@pytest.mark.parametrize("arguments", [[], ["a", "b"], ["a", "--model"]])
def test_wrong_arguments(arguments):
    with pytest.raises(ToolkitError, match="give one folder: python -m quant validate DIR"):
        main(["validate", *arguments])


@pytest.mark.parametrize("name", ["weights", "quant_model_description.json", "config.json"])
def test_a_flipped_bit_is_named_by_validate_and_when_loading(tmp_path, capsys, name):
    folder = Folder(tmp_path, "glm_f16_w8a8").path
    names = [file.name for file in folder.iterdir()]
    write_checksums(folder, names)
    assert not [text for text in texts_of(folder) if "damaged" in text]
    file = next(folder.glob("*.safetensors")) if name == "weights" else folder / name
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert any(f"{file} is damaged" in text for text in texts_of(folder))
    assert main(["validate", str(folder)]) == 1
    assert f"{file} is damaged" in capsys.readouterr().out
    with pytest.raises(ToolkitError, match="is damaged"):
        check_checksums(folder)


def texts_of(folder):
    return [finding.text for finding in validate(folder).found]
