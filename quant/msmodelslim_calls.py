"""Calls the real msmodelslim (classic API) for one layer, with guards against what it does
silently.

Takes a LayerModule and residual streams before it, returns the tensors and kinds that msmodelslim
saves for the layer. Facts behind the guards: docs/quant.md, "Traps".
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

from models.checkpoint.tensor_files import load_tensors
from runtime.common.broken_imports import preload_line
from runtime.common.errors import CHECK_FAILED, MISSING_COMPONENT, ToolkitError
from runtime.common.notes import note

from .layer_module import LayerModule, relative_error

LINEAR_PAIR_METHODS = ("m4", "m6")  # also scale one linear layer against the next
MAX_CHANGE = 1e-4  # relative change of a float32 layer's output that anti-outlier may cause
MODEL_TYPE = "ascend_vlm_layer"
INSTALL = "pip install 'ascend-vlm[quant]'"


@dataclass(frozen=True)
class Scheme:
    """QuantConfig fields of one --scheme. calibrated: activations have stored scales, which are
    measured on samples."""

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
def import_msmodelslim():
    """Import msmodelslim quietly; ToolkitError with the command that installs it. It has binaries
    for Python up to 3.12 only."""
    if sys.version_info >= (3, 13):
        raise ToolkitError(
            f"msmodelslim has no binaries for Python {sys.version.split()[0]}, only up to 3.12; make the "
            "environment with python3.12",
            MISSING_COMPONENT,
        )
    if importlib.util.find_spec("msmodelslim") is None:
        raise ToolkitError(f"msmodelslim is not installed; run: {INSTALL}", MISSING_COMPONENT)
    threads = os.environ["OPENBLAS_NUM_THREADS"]  # quant/__init__.py says why it is set
    if threads != "1":
        note(
            f"OPENBLAS_NUM_THREADS is {threads}: if OpenBLAS warns of an OpenMP loop, or nothing goes on, run: "
            "export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1"
        )
    _import_quietly()
    from tqdm import tqdm

    for name in ("msmodelslim", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    tqdm.__init__ = functools.partialmethod(tqdm.__init__, disable=True)  # several bars per layer
    _register_adapter()
    gc.freeze()  # msmodelslim collects garbage in every layer; a million objects of packages take 2 s


def _import_quietly():
    logging.disable(logging.WARNING)  # it complains that there is no NPU
    try:  # llm_ptq_tools first: other parts fail when they are imported before it
        importlib.import_module("msmodelslim.pytorch.llm_ptq.llm_ptq_tools")
        importlib.import_module("msmodelslim.pytorch.llm_ptq.anti_outlier")
    except ImportError as error:
        raise ToolkitError(
            f"msmodelslim cannot be imported ({error}); run: {preload_line(str(error)) or INSTALL}",
            MISSING_COMPONENT,
        ) from None
    finally:
        logging.disable(logging.NOTSET)


@contextlib.contextmanager
def private_directory():
    """Work in a temporary directory -> its path: msmodelslim writes features.npy into the working
    directory, and weights that only their owner may read."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory(prefix="ascend-vlm-quant-") as path:
        os.chdir(path)
        try:
            yield Path(path)
        finally:
            os.chdir(before)


@contextlib.contextmanager
def failures_in_one_sentence(layer: LayerModule):
    """ToolkitError with msmodelslim's last message for whatever it raises."""
    try:
        yield
    except (ToolkitError, OSError, MemoryError):
        raise
    except Exception as error:  # its classes are as many as its modules
        message = " ".join(str(error).split())
        raise ToolkitError(
            f"msmodelslim failed in the layer of {layer.linear_names[0]} ({type(error).__name__}: "
            f"{message[:300]}); finished layers are kept, try another --act-method or --scheme",
            CHECK_FAILED,
        ) from error


def set_config(layer: LayerModule, dtype: torch.dtype):
    """Give the layer the config that msmodelslim reads. dtype: float type of the result, on which
    the form of deq_scale depends; its factors stay float32."""
    from transformers import PretrainedConfig

    decoder = layer.family.decoder
    layer.config = PretrainedConfig(
        num_attention_heads=decoder.heads, num_key_value_heads=decoder.kv_heads
    )
    layer.config.model_type = MODEL_TYPE
    layer.config.architectures = ["AscendVlmLayer"]
    layer.config.dtype = dtype


def norm_linear_subgraph(layer: LayerModule, method: str) -> dict[str, list[str]]:
    """{norm or linear layer: the linear layers after it against which anti-outlier may scale it},
    by name.

    Only pairs between which nothing but a multiplication per channel stands: not a fused gate and
    up, whose halves are multiplied with each other, nor pairs with an activation between them, nor
    a post-norm, behind which the branch joins the residual stream.
    """
    groups = layer.groups
    pairs = {
        layer.norms["attention_norm"]: groups["qkv"],
        layer.norms["mlp_norm"]: groups["up"],
    }
    if method in LINEAR_PAIR_METHODS and len(groups["qkv"]) == 3:
        value = groups["qkv"][2]
        pairs[value] = groups["out"]
    if method in LINEAR_PAIR_METHODS and len(groups["up"]) == 2:
        up = groups["up"][1]
        pairs[up] = groups["down"]
    return pairs


def _register_adapter():
    from msmodelslim.pytorch.llm_ptq.model.base import ModelAdapter, ModelAdapterRegistry

    @ModelAdapterRegistry.register(MODEL_TYPE)
    class LayerAdapter(ModelAdapter):
        def get_norm_linear_subgraph(self, cfg, dummy_input=None, norm_class=None):
            pairs = norm_linear_subgraph(self.model, cfg.anti_method)
            return {first: list(rest) for first, rest in pairs.items()}


def sample_numbers(count: int) -> list[list[torch.Tensor]]:
    """Calibration data for msmodelslim: for each sample the arguments of LayerModule.forward."""
    return [[torch.tensor([number])] for number in range(count)]


def suppress_outliers(layer: LayerModule, method: str, expected: list[torch.Tensor]):
    """AntiOutlier over the samples in layer.streams; ToolkitError if it changes what the layer
    computes.

    expected: the layer's outputs before.
    """
    from msmodelslim.pytorch.llm_ptq.anti_outlier import AntiOutlier, AntiOutlierConfig

    config = AntiOutlierConfig(anti_method=method, dev_type="cpu")
    with failures_in_one_sentence(layer):
        AntiOutlier(layer, calib_data=sample_numbers(len(layer.streams)), cfg=config).process()
    found = layer.float_outputs(dict(enumerate(layer.streams)))
    changes = [
        relative_error(expected[number], found[number], stream)
        for number, stream in enumerate(layer.streams)
    ]
    if not max(changes) <= MAX_CHANGE:
        raise ToolkitError(
            f"--anti {method} changes what the float model computes, by {max(changes):.1e} in the layer of "
            f"{layer.linear_names[0]} (limit {MAX_CHANGE:g}); use --anti m2 or leave --anti out",
            CHECK_FAILED,
        )


def quant_config(scheme: Scheme, act_method: int, fraction: float, kept_float: set[str]):
    """msmodelslim's QuantConfig. kept_float: names of linear layers that are not quantised."""
    from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import QuantConfig

    settings = dict(scheme.settings)
    if scheme.calibrated:
        settings["act_method"] = act_method
    if settings.get("is_lowbit"):
        settings["fraction"] = fraction
    return QuantConfig(
        dev_type="cpu",
        mm_tensor=False,
        pr=1.0,
        disable_last_linear=False,
        disable_names=sorted(kept_float),
        **settings,
    )


def quantise_linears(
    layer: LayerModule,
    config,
    float_streams: list[torch.Tensor],
    streams: list[torch.Tensor],
    input_ranges: dict[str, float] | None,
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Calibrate and quantise the linear layers -> (tensors, kinds), by name, as msmodelslim saves
    them.

    float_streams: the samples' residual streams before the layer in the float model, on which
    msmodelslim chooses observers; not needed with input_ranges {linear layer: max |x| / standard
    deviation of its input}, from which act_method 3 chooses and which the other methods ignore.
    streams: the samples' residual streams after the quantised layers before this one; [] for a
    scheme that is not calibrated. Afterwards layer.outputs are the samples' outputs as computed
    during calibration.
    """
    from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator

    data = sample_numbers(len(streams)) or None
    with (
        private_directory() as folder,
        reused_input_ranges(input_ranges),
        failures_in_one_sentence(layer),
    ):
        layer.streams = float_streams
        calibrator = Calibrator(layer, config, calib_data=data, disable_level="L0")
        cache_quantised_weights(layer)
        layer.streams = streams
        layer.outputs = {}
        calibrator.run()
        calibrator.save(str(folder / "out"), save_type=["ascendV1"])
        return _saved(folder / "out")


@contextlib.contextmanager
def reused_input_ranges(ranges: dict[str, float] | None):
    """Make msmodelslim take these input ranges ({} where nothing depends on them) instead of
    running the float layer again; None: let it measure them."""
    from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import quant_tools

    measure = quant_tools.get_features
    if ranges is not None:
        states = {name: _as_features(ratio) for name, ratio in ranges.items()}
        quant_tools.get_features = lambda *_: states
    try:
        yield
    finally:
        quant_tools.get_features = measure


def _as_features(ratio: float) -> dict[str, torch.Tensor]:
    """Features from which msmodelslim computes max |x| / standard deviation = `ratio`."""
    return {"t_max": torch.tensor(ratio), "t_min": torch.tensor(0.0), "std": torch.tensor(1.0)}


def cache_quantised_weights(layer: LayerModule):
    """Quantise each weight once instead of in every forward pass: scales do not change, so neither
    do the values."""
    from msmodelslim.pytorch.llm_ptq.llm_ptq_tools.quant_modules import LinearQuantizer

    for module in layer.modules():
        if isinstance(module, LinearQuantizer):
            module.quant_weight.tensor_forward = _FirstResult(module.quant_weight.tensor_forward)


class _FirstResult:
    """A function that computes once and then repeats its first result."""

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
        for name, tensor in load_tensors(file).items():
            tensors[name] = tensor.clone()  # not a view of the file, which is removed
    description = json.loads((folder / "quant_model_description.json").read_text(encoding="utf-8"))
    kinds = {name: description[name] for name in tensors}
    return tensors, kinds
