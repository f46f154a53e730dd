"""Vision sessions: pictures in the family's input layout in, rows to splice out. One interface, several machines.

encode(pixels [n, ...] float32) -> features [n, rows, hidden] float32, for any n; the exported graph has batch 1.
"""
import numpy as np

from models.base import Family, VisionSpec
from models.checkpoint import Checkpoint

from .artifact import ONNX, ensure
from .errors import CHECK_FAILED, MISSING_COMPONENT, ToolkitError


class VisionSession:
    """What every session does around `_encode_one`: check the pictures going in and the features coming out."""
    stage: str

    def __init__(self, spec: VisionSpec):
        self.spec = spec

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [n, *input_shape[1:]] -> float32 [n, rows, hidden]. ToolkitError on a wrong input, NaN or Inf."""
        wanted = self.spec.input_shape[1:]
        if pixels.dtype != np.float32 or pixels.shape[1:] != wanted:
            raise ToolkitError(f"{self.stage} got pixels {pixels.dtype} {list(pixels.shape)}, it takes float32 "
                               f"[n, {', '.join(map(str, wanted))}]; prepare pictures with the family's `pixels`")
        features = np.empty((len(pixels), *self.spec.output_shape[1:]), np.float32)
        for index, picture in enumerate(np.ascontiguousarray(pixels)):
            features[index] = self._encode_one(picture[None])[0]
        if not np.isfinite(features).all():
            raise ToolkitError(f"{self.stage} gave NaN or Inf; check the checkpoint's vision weights with "
                               "`python -m convert`", CHECK_FAILED)
        return features

    def _encode_one(self, pixels: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def describe(self) -> str:
        raise NotImplementedError


class TorchVision(VisionSession):
    """The family's own module on the CPU, weights streamed from the checkpoint as `dtype`."""
    stage = "torch vision encoder"

    def __init__(self, family: Family, checkpoint: Checkpoint, dtype=None):
        import torch
        super().__init__(family.vision)
        self.torch, self.dtype, self.source = torch, dtype or torch.float32, checkpoint.directory
        with torch.device("meta"):
            self.tower = family.vision_encoder().eval().requires_grad_(False)
        self.tower.load_state_dict(_tower_weights(family, checkpoint, self.dtype), assign=True)

    def _encode_one(self, pixels):
        with self.torch.inference_mode():
            return self.tower(self.torch.from_numpy(pixels).to(self.dtype)).float().numpy()

    def describe(self):
        return f"vision: torch {self.torch.__version__} CPU, {str(self.dtype).split('.')[-1]}, weights of {self.source}"


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

    def _encode_one(self, pixels):
        return self.session.run([self.spec.output_name], {self.spec.input_name: pixels})[0]

    def describe(self):
        return f"vision: onnxruntime {self.version} CPU, fp32, artifact {self.directory}"


def open_session(kind: str, family: Family, checkpoint: Checkpoint, artifact=None,
                 threads: int | None = None) -> VisionSession:
    """Session of `kind`: "torch", "onnx", "om" or "auto" (here: onnx). Without `artifact` the cached one is used."""
    if family.vision is None:
        raise ToolkitError(f"{family.name} takes no pictures; leave the picture out")
    if kind == "om":
        raise ToolkitError("vision om needs an Ascend NPU with ais_bench; use --vision onnx here", MISSING_COMPONENT)
    if kind == "torch":
        return TorchVision(family, checkpoint)
    return OnnxVision(ensure(family, checkpoint, artifact), family.vision, threads)


def _tower_weights(family: Family, checkpoint: Checkpoint, dtype) -> dict:
    from .progress import byte_progress
    with byte_progress("loading vision weights") as update:
        return {name.removeprefix("vision."): tensor for name, tensor
                in checkpoint.assemble(family.weights(), prefix="vision.", dtype=dtype, progress=update)}

