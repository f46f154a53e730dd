"""What the loaders of MindIE-LLM and vllm-ascend ask of a quantised folder, as they were seen to ask
when they read one: our folders have all of it, and `validate` wants it for that loader."""

import json
import shutil

import paths
import pytest
import torch
from safetensors.torch import load_file, save_file

from models.checkpoint.quantized import halves_of
from quant.validate.findings import A2, MINDIE, P310
from quant.validate.folder import validate

SLIM = paths.GOLDEN / "msmodelslim"
LAYER = "model.layers.1.mlp.down_proj"
INT64, INT32, INT8, FLOAT = torch.int64, torch.int32, torch.int8, "float"

# tensor -> (dtype, shape), n rows and k columns
STATIC = {
    "weight": (INT8, "nk"),
    "input_scale": (FLOAT, "1"),
    "input_offset": (FLOAT, "1"),
    "quant_bias": (INT32, "n"),
}
STATIC_HALF = {**STATIC, "deq_scale": (INT64, "n")}
STATIC_BF16 = {**STATIC, "deq_scale": (torch.float32, "n")}
DYNAMIC = {
    "weight": (INT8, "nk"),
    "weight_scale": (FLOAT, "n1"),
    "weight_offset": (FLOAT, "n1"),
}
# (folder, loader, what it asks of every quantised layer)
RECIPES = [
    ("glm_f16_w8a8", MINDIE, STATIC_HALF),
    ("glm_f16_w8a8", A2, STATIC_HALF),
    ("glm_f16_w8a8", P310, STATIC_HALF),
    ("llama_f16_w8a8_m4", MINDIE, STATIC_HALF),
    ("llama_f16_w8a8_m4", A2, STATIC_HALF),
    ("glm_bf16_w8a8", MINDIE, STATIC_BF16),
    ("glm_bf16_w8a8", A2, STATIC_BF16),
    ("glm_f16_w8a8s", MINDIE, STATIC_HALF),
    ("glm_f16_w8a8s", P310, STATIC_HALF),
    ("glm_f16_w8a8_dynamic", A2, DYNAMIC),
]
REFUSED = [("glm_bf16_w8a8", P310), ("glm_f16_w8a8s", A2), ("glm_f16_w8a8_dynamic", P310)]
ASKED = [(*recipe[:2], tensor) for recipe in RECIPES for tensor in recipe[2]]


class Folder:
    def __init__(self, name, path):
        """A copy of the golden folder, with the names of halves that our folders have."""
        self.path = shutil.copytree(SLIM / name, path / "m")
        (self.file,) = self.path.glob("*.safetensors")
        self.tensors = load_file(self.file)
        self.description = json.loads((self.path / "quant_model_description.json").read_text())
        self.description |= halves_of(self.description)

    def judged(self):
        save_file(self.tensors, self.file)
        (self.path / "quant_model_description.json").write_text(json.dumps(self.description))
        return validate(self.path)


@pytest.fixture
def folder(tmp_path):
    return lambda name: Folder(name, tmp_path)


@pytest.mark.parametrize("name, loader, asked", RECIPES)
def test_the_folder_has_what_the_loader_asks_for(name, loader, asked, folder):
    f = folder(name)
    assert f.judged().loads(loader)
    n, k = f.tensors[f"{LAYER}.weight"].shape
    shapes = {"nk": (n, k), "n": (n,), "n1": (n, 1), "1": (1,)}
    for tensor, (dtype, shape) in asked.items():
        found = f.tensors[f"{LAYER}.{tensor}"]
        assert tuple(found.shape) == shapes[shape], tensor
        assert found.is_floating_point() if dtype == FLOAT else found.dtype == dtype, tensor


@pytest.mark.parametrize("name, loader, tensor", ASKED)
def test_validate_wants_each_of_them(name, loader, tensor, folder):
    """vllm-ascend would leave the parameter as uninitialised memory, without a word."""
    f = folder(name)
    del f.tensors[f"{LAYER}.{tensor}"], f.description[f"{LAYER}.{tensor}"]
    assert not f.judged().loads(loader)


@pytest.mark.parametrize("name, loader", REFUSED)
def test_what_a_loader_has_no_method_for(name, loader, folder):
    assert not folder(name).judged().loads(loader)


@pytest.mark.parametrize("loader", [A2, P310])
@pytest.mark.parametrize("half", ["gate_proj", "up_proj"])
def test_vllm_ascend_looks_the_halves_up(half, loader, folder):
    """KeyError while it builds the model; MindIE does without."""
    f = folder("glm_f16_w8a8")
    del f.description[f"model.layers.0.mlp.{half}.weight"]
    found = f.judged()
    assert not found.loads(loader) and found.loads(MINDIE)


@pytest.mark.parametrize("tensor", ["weight_scale", "weight_offset"])
def test_mindie_never_asks_for_the_scales_of_static_weights(tensor, folder):
    f = folder("glm_f16_w8a8")
    for name in [name for name in f.tensors if name.endswith(tensor)]:
        del f.tensors[name], f.description[name]
    assert f.judged().loads(MINDIE)


def test_a_tensor_of_no_layer(folder):
    """KeyError in vllm-ascend, ignored by MindIE; no engine can want it."""
    f = folder("glm_f16_w8a8")
    f.tensors["model.layers.0.mlp.extra.weight"] = torch.zeros(2)
    f.description["model.layers.0.mlp.extra.weight"] = "FLOAT"
    assert not f.judged().loads(A2)


@pytest.mark.parametrize(
    "name, dtype", [("glm_f16_w8a8", torch.float32), ("glm_bf16_w8a8", torch.int64)]
)
def test_deq_scale_of_the_other_float_type(name, dtype, folder):
    """Loaded silently, and read as other numbers."""
    f = folder(name)
    f.tensors[f"{LAYER}.deq_scale"] = f.tensors[f"{LAYER}.deq_scale"].to(dtype)
    assert not f.judged().loads(A2)
