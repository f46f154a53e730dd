"""The sessions that fit a family: one for pictures of one size, one for pictures of any size."""

from functools import partial
from pathlib import Path

from models.checkpoint import Checkpoint
from models.config import PatchSpec
from models.family import Family

from .om_session import OmVision
from .onnx_session import OnnxVision
from .patch_sessions import OmPatches, OnnxPatches, TorchPatches
from .source import Source
from .torch_session import TorchVision


def any_size(family: Family) -> bool:
    """Whether the family's pictures may have any size."""
    return isinstance(family.vision, PatchSpec)


def open_torch(family: Family, checkpoint: Checkpoint, precision: str = "fp32"):
    """The family's own module. ToolkitError when bf16 or int8 changes the features too much."""
    session = TorchPatches if any_size(family) else TorchVision
    return session(family, checkpoint, precision)


def open_onnx(
    source: Source,
    folder: Path,
    threads: int | None = None,
    verified: bool = True,
    fall_back: bool = False,
):
    """The graph in an artifact's folder. verified: it was compared with torch. fall_back: pictures
    too large for ONNX Runtime's memory are encoded in torch, not refused."""
    family = source.family
    if not any_size(family):
        return OnnxVision(folder, family.vision, threads, verified)
    large = partial(TorchPatches, family, source.checkpoint) if fall_back else None
    return OnnxPatches(folder, family, threads, verified, large)


def open_om(path: str | Path, family: Family, device_id: int = 0, verified: bool = False):
    """The .om at `path`. ToolkitError when its interface is not that of the family's encoder."""
    if any_size(family):
        return OmPatches(path, family, device_id, verified)
    return OmVision(path, family.vision, device_id, verified)
