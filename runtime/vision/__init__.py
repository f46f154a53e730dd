"""Vision sessions: pictures in the family's input layout in, rows to splice out. One interface, several machines.

encode(pixels [n, ...] float32) -> features [n, rows, hidden] float32, for any n, however many a machine takes at once.
"""
import sys

import numpy as np

from models.checkpoint.reader import Checkpoint
from models.family import Family, VisionSpec
from runtime.ascend.host import npu_nodes
from runtime.common.errors import CHECK_FAILED, ToolkitError

from .artifact import ONNX, ensure


class VisionSession:
    """What every session does around `_encode`: check the pictures going in and the features coming out."""
    stage: str
    batch = 1           # pictures `_encode` takes at most

    def __init__(self, spec: VisionSpec):
        self.spec = spec

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [n, *input_shape[1:]] -> float32 [n, rows, hidden]. ToolkitError on a wrong input, NaN or Inf."""
        wanted = self.spec.input_shape[1:]
        if pixels.dtype != np.float32 or pixels.shape[1:] != wanted:
            raise ToolkitError(f"{self.stage} got pixels {pixels.dtype} {list(pixels.shape)}, it takes float32 "
                               f"[n, {', '.join(map(str, wanted))}]; prepare pictures with the family's `pixels`")
        features = np.empty((len(pixels), *self.spec.output_shape[1:]), np.float32)
        pixels = np.ascontiguousarray(pixels)
        for start in range(0, len(pixels), self.batch):
            features[start:start + self.batch] = self._encode(pixels[start:start + self.batch])
        if not np.isfinite(features).all():
            raise ToolkitError(f"{self.stage} gave NaN or Inf; check the checkpoint's vision weights with "
                               "`python -m convert`", CHECK_FAILED)
        return features

    def close(self):
        """Give back what the session holds outside this process."""

    def _encode(self, pixels: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def describe(self) -> str:
        raise NotImplementedError


class TorchVision(VisionSession):
    """The family's own module on the CPU, its layers packed for products in `precision`: fp32, bf16 or int8. The last two
    are checked against float32 on a test picture."""
    stage = "torch vision encoder"

    def __init__(self, family: Family, checkpoint: Checkpoint, precision: str = "fp32"):
        import torch

        from .packed_tower import pack, pack_checked
        super().__init__(family.vision)
        self.torch, self.precision, self.source = torch, precision, checkpoint.directory
        with torch.inference_mode():
            tower = plain_tower(family, checkpoint)
            self.tower = pack(tower, "fp32") if precision == "fp32" else pack_checked(tower, precision, self.spec.input_shape)

    def _encode(self, pixels):
        with self.torch.inference_mode():
            return self.tower(self.torch.from_numpy(pixels)).float().numpy()

    def describe(self):
        return f"vision: torch {self.torch.__version__} CPU, {self.precision}, weights of {self.source}"


class OnnxVision(VisionSession):
    """The exported graph in ONNX Runtime on the CPU. `threads`: None = one per core."""
    stage = "ONNX vision encoder"

    def __init__(self, directory, spec: VisionSpec, threads: int | None = None):
        import onnxruntime
        super().__init__(spec)
        self.directory, self.version = directory, onnxruntime.__version__
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads or 0
        try:
            self.session = onnxruntime.InferenceSession(str(directory / ONNX), options, ["CPUExecutionProvider"])
        except Exception as error:      # onnxruntime raises plain Exceptions of its own
            reason = str(error).strip().splitlines()[0]
            raise ToolkitError(f"{directory / ONNX} cannot be loaded ({reason}); "
                               "convert it again with --force") from error

    def _encode(self, pixels):
        return self.session.run([self.spec.output_name], {self.spec.input_name: pixels})[0]

    def describe(self):
        return f"vision: onnxruntime {self.version} CPU, fp32, artifact {self.directory}"


def open_session(kind: str, family: Family, checkpoint: Checkpoint, artifact=None, threads: int | None = None,
                 device: str = "cpu", precision: str = "fp32") -> VisionSession:
    """Session of `kind`: "torch", "onnx", "om" or "auto" (om where an NPU and a fitting .om are, else onnx; torch for a
    `precision` other than fp32).

    Without `artifact` the cached one is used. An om runs on the NPU of `device`, with the decoder on the CPU on npu:0.
    """
    if family.vision is None:
        raise ToolkitError(f"{family.name} takes no pictures; leave the picture out")
    if kind == "torch" or precision != "fp32":
        return TorchVision(family, checkpoint, precision)
    om = _wanted_om(kind, family, checkpoint, artifact)
    if om is None:
        return OnnxVision(ensure(family, checkpoint, artifact), family.vision, threads)
    from .om_session import OmVision, check_chip
    check_chip(om)
    if om.note:
        print(om.note, file=sys.stderr)
    return OmVision(om.path, family.vision, int(device.partition(":")[2] or 0), om.verified)


def check_om(family: Family, checkpoint: Checkpoint, artifact=None):
    """ToolkitError for what `--vision om` lacks: the package (exit 3), the file, a manifest that fits."""
    from runtime.ascend.aclruntime import infer_session
    infer_session()
    _wanted_om("om", family, checkpoint, artifact)


def _wanted_om(kind, family, checkpoint, artifact):
    """The OmFile to run, None for ONNX. "auto" takes one only where an NPU is, and unnamed only one that was verified."""
    from .om_session import find_om
    named = str(artifact or "").endswith(".om")
    if kind == "onnx" and named:
        raise ToolkitError(f"--artifact {artifact} is an .om, which --vision onnx cannot run; use --vision om")
    if kind == "auto" and not named and not npu_nodes() or kind == "onnx":
        return None
    om = find_om(family, checkpoint, artifact)
    if om is None and kind == "om":
        raise ToolkitError(f"no .om in {artifact or f'the cache, nor in {checkpoint.directory}'}; give one with --artifact "
                           "FILE.om, or make one with `python -m convert`")
    return om if kind == "om" or om and (om.verified or named) else None


def plain_tower(family: Family, checkpoint: Checkpoint, dtype=None):
    """The family's module with the checkpoint's weights, as stored or as `dtype`."""
    import torch

    from runtime.common.progress import byte_progress
    with torch.device("meta"):
        tower = family.vision_encoder().eval().requires_grad_(False)
    with byte_progress("loading vision weights") as update:
        tower.load_state_dict({name.removeprefix("vision."): tensor for name, tensor in checkpoint.assemble(
            family.weights(), prefix="vision.", dtype=dtype, progress=update)}, assign=True)
    return tower
