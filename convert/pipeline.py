"""The conversion: export -> preflight -> verify -> publish -> atc.

Takes a Source and an artifact directory, leaves there a verified vision.onnx and, where CANN is
installed, an .om. Everything is made in a work directory inside the artifact directory (same file
system) and published when it is proved: a killed run leaves nothing that looks complete, and the
next run continues after the last completed step.
"""

import errno
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Thread

from convert.atc.build import OmBuild
from convert.atc.command import OmRequest
from convert.atc.inputs import write_atc_inputs
from convert.atc.plan import next_step
from convert.atc.run import InstalledAtc
from convert.export.trace import OPSET, trace
from convert.export.write import check_space, reuse_memory, write_onnx
from convert.verify.preflight import preflight
from convert.verify.verification import verify
from models import family_of
from models.checkpoint import Checkpoint
from models.checkpoint.quantized import stored_weights
from models.errors import ModelError
from models.family import Family
from models.files import open_own, open_regular, read_record
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.files import (
    LOCK,
    fresh_folder,
    locked,
    problem_of,
    remove_folder,
    work_folder,
    write_atomically,
)
from runtime.common.machine import version
from runtime.common.notes import note
from runtime.common.progress import spinner
from runtime.vision import artifact
from runtime.vision.artifact import ONNX, ONNX_NAMES, ONNX_UNVERIFIED, ONNX_VERIFIED, Manifest
from runtime.vision.registry import register
from runtime.vision.source import EXPORTER, Source, check_exporter

WORK = ".partial"
EXPORTED = "exported.json"  # [source hash, files] of a completed export in the work directory
SHOWN = 10  # findings of the preflight on screen


def vision_family(model_dir: str) -> Family:
    """The family of a checkpoint, by its config.json; ToolkitError without a vision encoder."""
    family = family_of(model_dir)
    if family.vision is None:
        raise ToolkitError(
            f"{model_dir} is a {family.name} model without a vision encoder: nothing to convert"
        )
    return family


def open_source(family: Family) -> Source:
    """The family with its checkpoint, whose tensors are checked against the family's table."""
    checkpoint = Checkpoint(family.directory)
    checkpoint.check(stored_weights(family))
    return Source(family, checkpoint)


@dataclass(frozen=True)
class Work:
    """What a conversion does besides: force: replace any artifact; verify: compare the ONNX with
    torch."""

    force: bool = False
    verify: bool = True


def convert(
    source: Source,
    artifact_dir: Path,
    request: OmRequest,
    installed: InstalledAtc | None,
    work: Work,
):
    """Make what the artifact lacks: the ONNX, its verification, then, with an installed atc, the
    .om."""
    make_writable(artifact_dir)
    with locked(artifact_dir):
        if work.force or not is_current(source, artifact_dir):
            make_artifact(source, artifact_dir, work.verify)
        elif work.verify:
            verify_artifact(source.family, artifact_dir)
        register(source.hash, artifact_dir)
        print(outcome_of(artifact_dir), flush=True)
        write_atc_inputs(source.family, artifact_dir, request)
        if installed:
            OmBuild(source.family, artifact_dir, request, installed).run()
        else:
            print(next_step(source.family, artifact_dir, request))


def make_writable(artifact_dir: Path):
    """Make the directory if it is missing; ToolkitError if nothing can be written there."""
    if artifact_dir.exists() and not artifact_dir.is_dir():
        raise ToolkitError(f"--out {artifact_dir} is a file; give a folder")
    try:
        artifact_dir.mkdir(parents=True, exist_ok=True)
        open_own(artifact_dir / LOCK).close()
    except OSError as error:
        raise ToolkitError(
            f"--out {artifact_dir} cannot be written ({error.strerror}); give another folder"
        ) from None


def is_current(source: Source, artifact_dir: Path) -> bool:
    """Whether the artifact is complete and made from `source`.

    ToolkitError if it was made from another checkpoint.
    """
    try:
        manifest = artifact.load(artifact_dir)
    except ToolkitError as error:
        if (artifact_dir / artifact.MANIFEST).exists():
            note(f"the artifact is made again: {error}")
        return False
    if manifest.source == source.hash:
        what = "the encoder of this checkpoint, not verified yet"
        if manifest.errors:
            what = "the verified encoder of this checkpoint; nothing to do"
        print(f"{artifact_dir} already holds {what}")
        return True
    if manifest.exporter == EXPORTER:
        raise ToolkitError(
            f"{artifact_dir} holds the encoder of another checkpoint; give another --out, or --force "
            "to replace it"
        )
    return False


def make_artifact(source: Source, artifact_dir: Path, verified: bool):
    """Export and check the encoder in the work directory, verify it there unless told not to, then
    publish it."""
    work_dir = work_folder(artifact_dir / WORK)
    files = resume_export(source, work_dir) or export_encoder(source, work_dir)
    try:
        check_graph(source.family, work_dir)
        errors = verify_export(source.family, work_dir) if verified else {}
    except ToolkitError as error:
        if error.exit_code == CHECK_FAILED:
            remove_folder(work_dir)
        raise
    artifact.publish(work_dir, artifact_dir, _manifest(source, files, errors))
    remove_folder(work_dir)


def verify_artifact(family: Family, artifact_dir: Path):
    """Compare a published ONNX with torch if that was left out when it was made."""
    manifest = artifact.read_manifest(artifact_dir)
    if not manifest.errors:
        artifact.mark_verified(artifact_dir, verify_export(family, artifact_dir))


def outcome_of(artifact_dir: Path) -> str:
    """What the user has now."""
    if artifact.read_manifest(artifact_dir).errors:
        return f"ONNX verified: {artifact_dir / ONNX}"
    return (
        f"ONNX not verified (--no-verify): {artifact_dir / ONNX}; the same command without the flag, "
        "or a passing python -m runtime.compare, verifies it"
    )


def resume_export(source: Source, work_dir: Path) -> dict | None:
    """{file: {bytes, sha256}} of an export that an interrupted run completed; None without one."""
    try:
        with open_regular(work_dir / EXPORTED, follow=False) as stream:
            source_hash, files = read_record(stream)
        if source_hash != source.hash:
            return None
        problem = _problem_of_export(work_dir, files)
    except FileNotFoundError:
        return None
    except (OSError, ModelError, ValueError, TypeError, KeyError) as error:
        problem = f"its record cannot be used ({error})"
    if problem:
        note(f"an interrupted export in {work_dir} is made again: {problem}")
        return None
    print("continuing after the export that an interrupted run completed")
    return files


def _problem_of_export(work_dir: Path, files: dict) -> str | None:
    """Why a recorded export is not one that this program wrote; None: it is."""
    if set(files) != ONNX_NAMES:
        return f"its record names {', '.join(map(repr, files))}"
    for name, entry in files.items():
        if (work_dir / name).is_symlink():
            return f"{name} is a link"
        if problem := problem_of(work_dir / name, entry, "its record"):
            return f"{name} {problem}"
    return None


def export_encoder(source: Source, work_dir: Path) -> dict:
    """{file: {bytes, sha256}} of a new export in `work_dir`, which holds nothing else."""
    check_exporter()
    start = time.perf_counter()
    fresh_folder(work_dir)
    with _removed_on_failure(work_dir):
        print(check_space(source.family, work_dir.parent), flush=True)
        reuse_memory()
        digest = _in_background(lambda: source.weights_digest)  # for source.hash
        with spinner("tracing the vision encoder"):
            model = trace(source.family.vision_encoder, source.family.vision)
            digest.result()
        files = write_onnx(model, source.family, source.checkpoint, work_dir)
        write_atomically(work_dir / EXPORTED, json.dumps([source.hash, files]))
    print(f"exported in {time.perf_counter() - start:.1f} s")
    return files


@contextmanager
def _removed_on_failure(work_dir: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        remove_folder(work_dir)
        if getattr(error, "errno", None) == errno.ENOSPC:
            raise ToolkitError(
                f"the disk of {work_dir.parent} became full during the export, nothing was kept; free "
                "some space or choose another --out"
            ) from None
        raise


def _in_background(function: Callable) -> Future:
    """The result of function(); its thread does not keep an interrupted program alive."""
    future = Future()

    def run():
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


def check_graph(family: Family, work_dir: Path):
    """ToolkitError (exit 1) with everything in the exported graph that ATC would refuse."""
    findings, operators = preflight(work_dir / ONNX, family.vision, OPSET)
    counts = ", ".join(f"{count} {operator}" for operator, count in operators.most_common())
    print(f"graph: {operators.total()} nodes, {counts}")
    if findings:
        lines = [f"\n  {finding}" for finding in findings[:SHOWN]]
        if len(findings) > SHOWN:
            lines.append("\n  ...")
        raise ToolkitError(
            f"the graph is not fit for ATC, {len(findings)} findings:" + "".join(lines),
            CHECK_FAILED,
        )


def verify_export(family: Family, work_dir: Path) -> dict:
    """{image: errors} of ONNX Runtime against torch; ToolkitError (exit 1) if they disagree."""
    start = time.perf_counter()
    results = verify(family, work_dir)
    for name, result in results.items():
        print(f"verify {name}: {result.verdict}")
    if not results or not all(result.passed for result in results.values()):
        raise ToolkitError(
            "ONNX Runtime and torch disagree, the graph is not to be used; report this with the lines "
            "above",
            CHECK_FAILED,
        )
    print(f"verified in {time.perf_counter() - start:.1f} s")
    return {name: asdict(result) for name, result in results.items()}


def _manifest(source: Source, files: dict, errors: dict) -> Manifest:
    spec = source.family.vision
    packages = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")
    return Manifest(
        source.hash,
        source.family.name,
        OPSET,
        input=_interfaces(spec.inputs),
        output=_interface(spec.output_name, spec.output_shape),
        files=files,
        errors=errors,
        status=ONNX_VERIFIED if errors else ONNX_UNVERIFIED,
        versions={package: version(package) for package in packages},
    )


def _interfaces(shapes: dict[str, tuple]) -> dict | list[dict]:
    """Of the one input, or of several in a list."""
    described = [_interface(name, shape) for name, shape in shapes.items()]
    return described[0] if len(described) == 1 else described


def _interface(name: str, shape: tuple) -> dict:
    return {"name": name, "shape": list(shape), "dtype": "float32"}
