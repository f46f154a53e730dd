"""Vision sessions: pictures in the family's input layout in, rows to splice out. One interface, several machines.

encode(pixels [n, ...] float32) -> features [n, rows, hidden] float32, for any n, however many a machine takes at once.
"""

import sys

from models.checkpoint.reader import Checkpoint
from models.family import Family
from runtime.ascend.host import npu_nodes
from runtime.common.errors import ToolkitError

from .artifact import find_or_convert
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
    """Session of `kind`: "torch", "onnx", "om" or "auto" (om where an NPU and a fitting .om are, else onnx; torch for a
    `precision` other than fp32).

    Without `artifact` the cached one is used. An om runs on the NPU of `device`, with the decoder on the CPU on npu:0.
    """
    if family.vision is None:
        raise ToolkitError(f"{family.name} takes no pictures; leave the picture out")
    if kind == "torch" or precision != "fp32":
        return TorchVision(family, checkpoint, precision)
    source = Source(family, checkpoint)
    om = _wanted_om(kind, source, artifact)
    if om is None:
        return OnnxVision(find_or_convert(source, artifact), family.vision, threads)
    from .om_session import OmVision, check_chip

    check_chip(om)
    if om.note:
        print(om.note, file=sys.stderr)
    return OmVision(om.path, family.vision, int(device.partition(":")[2] or 0), om.verified)


def check_om(family: Family, checkpoint: Checkpoint, artifact=None):
    """ToolkitError for what `--vision om` lacks: the package (exit 3), the file, a manifest that fits."""
    from runtime.ascend.aclruntime import infer_session

    infer_session()
    _wanted_om("om", Source(family, checkpoint), artifact)


def _wanted_om(kind: str, source: Source, artifact):
    """The OmFile to run, None for ONNX. "auto" takes one only where an NPU is, and unnamed only one that was verified."""
    from .om_session import find_om

    named = str(artifact or "").endswith(".om")
    if kind == "onnx" and named:
        raise ToolkitError(
            f"--artifact {artifact} is an .om, which --vision onnx cannot run; use --vision om"
        )
    if kind == "auto" and not named and not npu_nodes() or kind == "onnx":
        return None
    om = find_om(source, artifact)
    if om is None and kind == "om":
        raise ToolkitError(
            f"no .om in {artifact or f'the cache, nor in {source.checkpoint.directory}'}; give one with --artifact "
            "FILE.om, or make one with `python -m convert`"
        )
    return om if kind == "om" or om and (om.verified or named) else None
