"""Vision sessions, one interface over several machines: takes a family, its checkpoint and what the
user chose, returns the session that encodes images."""

import shlex
from pathlib import Path

from models.checkpoint import Checkpoint
from models.family import Family
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.files import locked
from runtime.common.notes import note

from .artifact import find_or_convert, known_directory, mark_verified, read_manifest
from .choose import open_om, open_onnx, open_torch
from .om_check import Verdict, remember, verdict_of
from .om_file import OM_FOR, check_chip, onnx_folder
from .session import VisionSession
from .source import Source, exports_here


def open_session(
    kind: str,
    family: Family,
    checkpoint: Checkpoint,
    artifact=None,
    threads: int | None = None,
    device: str = "cpu",
    precision: str = "fp32",
    judge_om: bool = True,
) -> VisionSession:
    """Session of `kind`: "torch", "onnx", "om" or "auto" (om where an NPU and a fitting .om are,
    else onnx; torch for a `precision` other than fp32, and where this torch cannot export one).

    artifact: an artifact's directory or an .om; None: the cached artifact, made if missing.
    threads: of ONNX Runtime; None: as many as this process may use.
    device: the decoder's; an om runs on the same NPU, and on npu:0 if the decoder is on the CPU.
    judge_om: an .om that no manifest vouches for is compared with torch when it is first used.

    ToolkitError when the family takes no images, or what `kind` needs is missing or does not fit.
    """
    if family.vision is None:
        raise ToolkitError(f"{family.name} takes no pictures; leave the picture out")
    if kind == "torch" or precision != "fp32":
        return open_torch(family, checkpoint, precision)
    source = Source(family, checkpoint)
    om = OM_FOR[kind](source, artifact)
    if om:
        check_chip(om)
        device_id = int(device.partition(":")[2] or 0)
        session = open_om(om.path, family, device_id, om.verified)
        if not judge_om or trusted(session, source, kind):
            return session
    if kind == "auto" and artifact is None and not exports_here() and not known_directory(source):
        note("this torch does not export encoders, and none was converted: torch runs it")
        return open_torch(family, checkpoint, precision)
    folder = find_or_convert(source, onnx_folder(artifact))
    verified = noted_if_unverified(folder, source)
    return open_onnx(source, folder, threads, verified, fall_back=kind == "auto")


def noted_if_unverified(folder: Path, source: Source) -> bool:
    """Whether the artifact was compared with torch; a note says so if it never was."""
    verified = bool(read_manifest(folder).errors)
    if not verified:
        command = ["python", "-m", "convert", "--model", str(source.checkpoint.directory)]
        note(
            f"the encoder in {folder} was never compared with torch (convert --no-verify): "
            f"`{shlex.join([*command, '--out', str(folder)])}` does that"
        )
    return verified


def remember_verified(encoder: Path, source: Source, cosine: float, distance: float):
    """From now on the artifact or .om counts as compared with torch, and nothing is said when it is
    used with this checkpoint. OSError when that cannot be written."""
    verdict = Verdict(True, cosine, distance)
    if encoder.suffix == ".om":
        remember(verdict, encoder, source)
        return
    with locked(encoder):
        mark_verified(encoder, {"runtime.compare": {"cosine": cosine, "distance": distance}})


def trusted(session: VisionSession, source: Source, kind: str) -> bool:
    """Whether the .om may encode: its manifest says that it was verified, or it computes what torch
    does.

    If not, --vision auto goes on without it, after a note; otherwise ToolkitError.
    """
    if session.verified:
        return True
    path = session.model.path
    try:
        verdict = verdict_of(session, path, source)
        session.verified = verdict.passed
    finally:
        if not session.verified:
            session.close()
    if verdict.passed:
        return True
    reason = f"{path} does not compute what this checkpoint does: {verdict.describe(source.family)}"
    if kind == "auto":
        note(f"{reason}; the encoder runs on the CPU")
        return False
    raise ToolkitError(
        f"{reason}; make it again with `python -m convert`, or leave --vision om out", CHECK_FAILED
    )
