"""The real msmodelslim (classic API), called for one layer, with guards against what it does without a word.

A LayerModule and its samples flow in; the tensors and kinds that msmodelslim saves for it flow out. Facts behind the
guards: docs/quant.md, "Traps".
"""

import contextlib
import functools
import gc
import importlib
import importlib.util
import json
import logging
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from runtime.common.errors import CHECK_FAILED, MISSING_COMPONENT, ToolkitError

ANTI_METHODS = ("m1", "m2", "m3", "m4", "m5", "m6")
PAIRS = ("m4", "m6")  # also scale one linear layer against the next
IDENTITY = (
    1e-4  # anti-outlier must leave a float32 layer's output as it was, up to this relative change
)
MODEL_TYPE = "ascend_vlm_layer"
INSTALL = "pip install 'ascend-vlm[quant]'"


@dataclass(frozen=True)
class Scheme:
    """QuantConfig fields of one --scheme; `calibrated`: activations have stored scales, which samples must give."""

    kind: str
    settings: dict
    calibrated: bool = True


SCHEMES = {
    "w8a8": Scheme("W8A8", {"w_bit": 8, "a_bit": 8}),
    "w8a8s": Scheme("W8A8S", {"w_bit": 4, "a_bit": 8, "is_lowbit": True}),
    "w8a8-dynamic": Scheme(
        "W8A8_DYNAMIC", {"w_bit": 8, "a_bit": 8, "is_dynamic": True}, calibrated=False
    ),
    "w8a16": Scheme("W8A16", {"w_bit": 8, "a_bit": 16}, calibrated=False),
}


@functools.cache
def open_slim():
    """Import msmodelslim; ToolkitError with the line that helps. It brings binaries for Python up to 3.12 only."""
    if sys.version_info >= (3, 13):
        raise ToolkitError(
            f"msmodelslim has no binaries for Python {sys.version.split()[0]}, only up to 3.12; make the "
            "environment with python3.12",
            MISSING_COMPONENT,
        )
    if importlib.util.find_spec("msmodelslim") is None:
        raise ToolkitError(f"msmodelslim is not installed; run: {INSTALL}", MISSING_COMPONENT)
    logging.disable(logging.WARNING)  # it complains that there is no NPU
    try:  # llm_ptq_tools first: other parts fail when they are imported before it
        importlib.import_module("msmodelslim.pytorch.llm_ptq.llm_ptq_tools")
        importlib.import_module("msmodelslim.pytorch.llm_ptq.anti_outlier")
    except ImportError as error:
        raise ToolkitError(
            f"msmodelslim cannot be imported ({error}); run: {INSTALL}", MISSING_COMPONENT
        ) from None
    finally:
        logging.disable(logging.NOTSET)
    from tqdm import tqdm

    for name in ("msmodelslim", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # several bars per layer
    _register_pairs()
    gc.freeze()  # msmodelslim collects garbage in every layer, and a million objects of packages take 2 s to look at


@contextlib.contextmanager
def private_directory():
    """msmodelslim writes features.npy into the working directory, and weights that only their owner may read."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="ascend-vlm-quant-") as path:
        os.chdir(path)
        try:
            yield Path(path)
        finally:
            os.chdir(before)


def configure(layer, dtype: torch.dtype):
    """The config that msmodelslim reads. `dtype`, of the files, decides the form of deq_scale, whose factors stay float32."""
    from transformers import PretrainedConfig

    d = layer.family.decoder
    layer.config = PretrainedConfig(num_attention_heads=d.heads, num_key_value_heads=d.kv_heads)
    layer.config.model_type = MODEL_TYPE
    layer.config.architectures = ["AscendVlmLayer"]
    layer.config.dtype = dtype


def subgraph(layer, method: str) -> dict[str, list[str]]:
    """Which norm (or linear layer) may be scaled against which linear layers.

    Only pairs between which nothing but a product per channel stands: not a fused gate and up, whose halves are
    multiplied, nor an activation.
    """
    g = layer.groups
    pairs = {layer.norms["attention_norm"]: g["qkv"], layer.norms["mlp_norm"]: g["up"]}
    if method in PAIRS and len(g["qkv"]) == 3:
        pairs[g["qkv"][2]] = g["out"]
    if method in PAIRS and len(g["up"]) == 2:
        pairs[g["up"][1]] = g["down"]
    return pairs


def _register_pairs():
    from msmodelslim.pytorch.llm_ptq.model.base import ModelAdapter, ModelAdapterRegistry

    @ModelAdapterRegistry.register(MODEL_TYPE)
    class LayerAdapter(ModelAdapter):
        def get_norm_linear_subgraph(self, cfg, dummy_input=None, norm_class=None):
            return {
                first: list(rest) for first, rest in subgraph(self.model, cfg.anti_method).items()
            }


def numbers(count: int) -> list[list[torch.Tensor]]:
    return [[torch.tensor([i])] for i in range(count)]


def suppress_outliers(layer, method: str, expected: list[torch.Tensor]):
    """AntiOutlier over the samples in layer.stream; ToolkitError if the layer then computes anything else.

    expected: the layer's outputs before.
    """
    from msmodelslim.pytorch.llm_ptq.anti_outlier import AntiOutlier, AntiOutlierConfig

    config = AntiOutlierConfig(anti_method=method, dev_type="cpu")
    AntiOutlier(layer, calib_data=numbers(len(layer.stream)), cfg=config).process()
    found = layer.float_outputs(dict(enumerate(layer.stream)))
    changes = [
        relative_change(x, before, found[i])
        for i, (x, before) in enumerate(zip(layer.stream, expected))
    ]
    if not max(changes) <= IDENTITY:
        raise ToolkitError(
            f"--anti {method} changes what the float model computes, by {max(changes):.1e} in the layer of "
            f"{layer.linear_names[0]} (limit {IDENTITY:g}); use --anti m2 or leave --anti out",
            CHECK_FAILED,
        )


def relative_change(x, before, after) -> float:
    """Of what the layer adds to the residual stream."""
    return ((after - before).norm() / (before - x).norm().clamp(min=1e-30)).item()


def quantise(
    layer,
    scheme: Scheme,
    keep: set[str],
    float_stream,
    stream,
    act_method: int,
    fraction: float,
    ranges=None,
):
    """Calibrate and quantise the linear layers that are not in `keep`.

    float_stream: what the float model feeds the layer, for the choice of observers; not needed with `ranges`
    {linear layer: max |x| / standard deviation of its input}, by which act_method 3 chooses and which the others ignore.
    stream: what the quantised layers before it feed it. Afterwards layer.outputs are the samples' outputs as computed
    during calibration.
    -> ({name: tensor}, {name: kind}) as msmodelslim saves them.
    """
    from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig

    settings = dict(scheme.settings)
    if scheme.calibrated:
        settings["act_method"] = act_method
    if settings.get("is_lowbit"):
        settings["fraction"] = fraction
    config = QuantConfig(
        dev_type="cpu",
        mm_tensor=False,
        pr=1.0,
        disable_last_linear=False,
        disable_names=sorted(keep),
        **settings,
    )
    data = numbers(len(stream)) if scheme.calibrated else None
    with private_directory() as work, known_ranges(ranges):
        layer.stream = float_stream
        calibrator = Calibrator(layer, config, calib_data=data, disable_level="L0")
        remember_weights(layer)
        layer.stream = stream
        layer.outputs = {}
        calibrator.run()
        calibrator.save(str(work / "out"), save_type=["ascendV1"])
        return _saved(work / "out")


@contextlib.contextmanager
def known_ranges(ranges: dict[str, float] | None):
    """msmodelslim takes input ranges that are known, or nobody asks for ({}), instead of running the float layer again."""
    from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import quant_tools

    measure = quant_tools.get_features
    if ranges is not None:
        states = {
            name: {"t_max": torch.tensor(r), "t_min": torch.tensor(0.0), "std": torch.tensor(1.0)}
            for name, r in ranges.items()
        }
        quant_tools.get_features = lambda *_: states
    try:
        yield
    finally:
        quant_tools.get_features = measure


def remember_weights(layer):
    """Quantise each weight once instead of in every forward pass: scales do not change, so nor do the values."""
    from msmodelslim.pytorch.llm_ptq.llm_ptq_tools.quant_modules import LinearQuantizer

    for module in layer.modules():
        if isinstance(module, LinearQuantizer):
            module.quant_weight.tensor_forward = _Once(module.quant_weight.tensor_forward)


class _Once:
    def __init__(self, compute):
        self.compute = compute
        self.result = None

    def __call__(self, tensor, y=None):
        if self.result is None:
            self.result = self.compute(tensor, y)
        return self.result


def _saved(folder: Path) -> tuple[dict, dict]:
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {name: tensor.clone() for name, tensor in load_file(file).items()}
    description = json.loads((folder / "quant_model_description.json").read_text(encoding="utf-8"))
    return tensors, {name: description[name] for name in tensors}
