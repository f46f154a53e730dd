"""Vision sessions, one interface over several machines: takes a family, its checkpoint and what the
user chose, returns the session that encodes images."""

from models.checkpoint import Checkpoint
from models.family import Family
from runtime.common.errors import ToolkitError
from runtime.common.notes import note

from .artifact import find_or_convert
from .om_file import OM_FOR, check_chip
from .om_session import OmVision
from .onnx_session import OnnxVision
from .session import VisionSession
from .source import Source
from .torch_session import TorchVision


def open_session(
    kind: str,
    family: Family,
    checkpoint: Checkpoint,
    artifact=None,
    threads: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
) -> VisionSession:
    """Session of `kind`: "torch", "onnx", "om" or "auto" (om where an NPU and a fitting .om are,
    else onnx; torch for a `precision` other than fp32).

    artifact: an artifact's directory or an .om; None: the cached artifact, made if missing.
    threads: of ONNX Runtime; None: one per core.
    device: the decoder's; an om runs on the same NPU, and on npu:0 if the decoder is on the CPU.

    ToolkitError when the family takes no images, or what `kind` needs is missing or does not fit.
    """
    if family.vision is None:
        raise ToolkitError(f"{family.name} takes no pictures; leave the picture out")
    if kind == "torch" or precision != "fp32":
        return TorchVision(family, checkpoint, precision)
    source = Source(family, checkpoint)
    om = OM_FOR[kind](source, artifact)
    if om is None:
        return OnnxVision(find_or_convert(source, artifact), family.vision, threads)
    check_chip(om)
    if om.note:
        note(om.note)
    device_id = int(device.partition(":")[2] or 0)
    return OmVision(om.path, family.vision, device_id, om.verified)
