"""The artifact directory: one verified vision encoder, with a manifest of what it was made from.

Takes a Source, returns a directory that fits it: vision.onnx, vision.onnx.data, manifest.json, and
the .om where there is one. The manifest is written last and atomically, so a directory without one
holds nothing usable.
"""

import hashlib
import json
import os
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path

from runtime.common.errors import ToolkitError
from runtime.common.files import READ_BYTES, cache_root, write_atomically
from runtime.common.notes import note
from runtime.common.processes import start_module
from runtime.common.progress import spinner

from .source import EXPORTER, Source

MANIFEST = "manifest.json"
ONNX = "vision.onnx"
DATA = "vision.onnx.data"
ONNX_VERIFIED = "onnx verified"
OM_COMPILED = "om compiled, not verified"
OM_VERIFIED = "om verified"


@dataclass
class Manifest:
    """manifest.json. `source` is the hash of a Source; `input` and `output` are {name, shape,
    dtype}; `files` is {name: {bytes, sha256}}; `errors` maps each verification image to what was
    measured against torch in fp32.

    With an .om, `soc_version` and `precision_mode` are the .om's, and `om` holds the rest: files
    {name: {bytes, sha256}} (the .om first), input {dtype, shape}, gears (batch sizes), command,
    cann (version), log, attempts (precision mode, cosine, distance, latency_ms of each .om measured
    on a device, the kept one last).
    """

    source: str
    family: str
    opset: int
    input: dict
    output: dict
    files: dict
    errors: dict
    versions: dict = field(default_factory=dict)
    soc_version: str | None = None  # set when an .om exists
    precision_mode: str = "fp32"
    status: str = ONNX_VERIFIED
    exporter: int = EXPORTER
    om: dict | None = None


def load(artifact_dir: str | Path) -> Manifest:
    """Manifest of a complete artifact; ToolkitError if the directory, the manifest or a file is
    missing or damaged."""
    artifact_dir = Path(artifact_dir)
    path = artifact_dir / MANIFEST
    if not path.is_file():
        raise ToolkitError(
            f"artifact {artifact_dir} {_what_lacks(artifact_dir)}; "
            f"make it with {_convert_command('CHECKPOINT', artifact_dir)}"
        )
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        sizes = {name: int(entry["bytes"]) for name, entry in manifest.files.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ToolkitError(
            f"{path} is not a manifest this version can read; "
            f"make it again with {_convert_command('CHECKPOINT', artifact_dir)}"
        ) from None
    for name, size in sizes.items():
        _check_file(artifact_dir, name, size)
    return manifest


def _what_lacks(artifact_dir: Path) -> str:
    if artifact_dir.is_dir():
        return "has no manifest.json"
    return "is a file" if artifact_dir.exists() else "does not exist"


def _check_file(artifact_dir: Path, name: str, size: int):
    path = artifact_dir / name
    if not path.is_file():
        problem = "is missing"
    elif path.stat().st_size != size:
        problem = f"has {path.stat().st_size:,} bytes, its manifest says {size:,}"
    else:
        return
    raise ToolkitError(
        f"{path} {problem}; make it again with {_convert_command('CHECKPOINT', artifact_dir)}"
    )


def publish(work_dir: Path, artifact_dir: Path, manifest: Manifest):
    """Move the manifest's files from `work_dir` (on the same file system) into `artifact_dir`.

    Killed at any moment, it leaves a complete artifact or a directory without a manifest.
    """
    (artifact_dir / MANIFEST).unlink(missing_ok=True)
    for name in manifest.files:
        os.replace(work_dir / name, artifact_dir / name)
    save(artifact_dir, manifest)


def file_entry(path: Path) -> dict:
    """{bytes, sha256} of a file, as a manifest records it."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(READ_BYTES):
            digest.update(block)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def save(artifact_dir: Path, manifest: Manifest):
    write_atomically(artifact_dir / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")


def om_file(manifest: Manifest, artifact_dir: str | Path) -> Path | None:
    """The .om of the manifest; None when there is none, or when it or its weights are no longer as
    recorded."""
    files = (manifest.om or {}).get("files", {})
    for name, entry in files.items():
        path = Path(artifact_dir) / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return None
    return Path(artifact_dir) / next(iter(files)) if files else None


def check_fits(manifest: Manifest, source: Source, artifact_dir: str | Path):
    """ToolkitError unless the artifact was made from this source, by this exporter."""
    model_dir = source.checkpoint.directory
    if manifest.exporter != EXPORTER:
        reason = f"was written by exporter {manifest.exporter}, this version needs {EXPORTER}"
    elif manifest.family != source.family.name:
        reason = f"holds a {manifest.family} encoder, {model_dir} is {source.family.name}"
    elif manifest.source != source.hash:
        reason = f"was made from another checkpoint than {model_dir}"
    else:
        return
    raise ToolkitError(
        f"artifact {artifact_dir} {reason}; run {_convert_command(model_dir, artifact_dir)} with "
        "--force, or leave --artifact out"
    )


def cache_directory(source: Source) -> Path:
    """Where the artifact of `source` lies when the user names none."""
    return cache_root() / "vision" / source.hash[:16]


def find_or_convert(source: Source, artifact: str | Path | None = None) -> Path:
    """Directory of an artifact that fits `source`: `artifact` itself, else the cached one,
    converted now if missing.

    ToolkitError if `artifact` does not fit, or if the conversion fails.
    """
    if artifact is not None:
        check_fits(load(artifact), source, artifact)
        return Path(artifact)
    with spinner("identifying the checkpoint by its vision weights"):
        cached = cache_directory(source)
    try:
        check_fits(load(cached), source, cached)
    except ToolkitError:
        note(f"no artifact given: converting the vision encoder once, into {cached}")
        _convert(source.checkpoint.directory, cached)
    return cached


def _convert(model_dir: Path, artifact_dir: Path):
    """Run the converter in a process of its own: its memory is given back, and the runtime never
    imports it."""
    with start_module(
        "convert",
        "--model",
        model_dir.resolve(),
        "--out",
        artifact_dir.absolute(),
        "--onnx-only",
        stdout=subprocess.DEVNULL,
    ) as process:
        code = process.wait()
    if code:
        raise ToolkitError(
            f"the conversion of {model_dir} failed (see above); --vision torch works without it",
            code,
        )


def _convert_command(model_dir: str | Path, artifact_dir: str | Path) -> str:
    return f"`python -m convert --model {model_dir} --out {artifact_dir}`"
