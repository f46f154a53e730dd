"""The artifact directory: one verified vision encoder, with a manifest that says what it was made from.

In flow a family and its checkpoint, out flows a directory that fits them: vision.onnx, vision.onnx.data, manifest.json.
The manifest is written last and atomically, so a directory without one holds nothing usable.
"""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from models.checkpoint.reader import Checkpoint
from models.checkpoint.table import Weight
from models.family import Family
from runtime.common.errors import ToolkitError
from runtime.common.files import READ_BYTES, cache_root, tensors_digest, write_atomically
from runtime.common.processes import start_module
from runtime.common.progress import spinner

MANIFEST = "manifest.json"
ONNX = "vision.onnx"
DATA = "vision.onnx.data"
ONNX_VERIFIED = "onnx verified"
OM_COMPILED = "om compiled, not verified"
OM_VERIFIED = "om verified"
EXPORTER = (
    1  # raise it when the exported graph changes: artifacts of older exporters are made again
)


@dataclass
class Manifest:
    """manifest.json. `input` and `output` are {name, shape, dtype}; `files` is {name: {bytes, sha256}}; `errors` maps
    each verification picture to what was measured against torch fp32.

    With an .om, `soc_version` and `precision_mode` are its own, and `om` says the rest: files {name: {bytes, sha256}}
    (the .om first), input {dtype, shape}, gears (batch sizes), command, cann (version), log, attempts (precision mode,
    cosine, distance, latency_ms of each .om measured on a device, the kept one last)."""

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


def load(directory: str | Path) -> Manifest:
    """Manifest of a complete artifact; ToolkitError if the directory, the manifest or a file is missing or damaged."""
    directory = Path(directory)
    path = directory / MANIFEST
    if not path.is_file():
        what = (
            "has no manifest.json"
            if directory.is_dir()
            else "is a file"
            if directory.exists()
            else "does not exist"
        )
        raise ToolkitError(
            f"artifact {directory} {what}; make it with {_convert_command('CHECKPOINT', directory)}"
        )
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        sizes = {name: int(entry["bytes"]) for name, entry in manifest.files.items()}
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ToolkitError(
            f"{path} is not a manifest this version can read; "
            f"make it again with {_convert_command('CHECKPOINT', directory)}"
        ) from None
    for name, size in sizes.items():
        there = (directory / name).stat().st_size if (directory / name).is_file() else None
        if there != size:
            problem = (
                "is missing"
                if there is None
                else f"has {there:,} bytes, its manifest says {size:,}"
            )
            raise ToolkitError(
                f"{directory / name} {problem}; "
                f"make it again with {_convert_command('CHECKPOINT', directory)}"
            )
    return manifest


def publish(work: Path, directory: Path, manifest: Manifest):
    """Move the manifest's files from `work` (same file system) into `directory`: complete, or without a manifest."""
    (directory / MANIFEST).unlink(missing_ok=True)
    for name in manifest.files:
        os.replace(work / name, directory / name)
    save(directory, manifest)


def entry(path: Path) -> dict:
    """What a manifest says of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while piece := stream.read(READ_BYTES):
            digest.update(piece)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def save(directory: Path, manifest: Manifest):
    write_atomically(directory / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")


def om_file(manifest: Manifest, directory: str | Path) -> Path | None:
    """The .om that the manifest describes; None when there is none, or it or its weights are not as recorded any more."""
    files = (manifest.om or {}).get("files", {})
    for name, entry in files.items():
        path = Path(directory) / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            return None
    return Path(directory) / next(iter(files)) if files else None


def check_fits(manifest: Manifest, family: Family, checkpoint: Checkpoint, directory: str | Path):
    """ToolkitError unless the artifact was made from this checkpoint's vision weights, by this exporter."""
    if manifest.exporter != EXPORTER:
        reason = f"was written by exporter {manifest.exporter}, this version needs {EXPORTER}"
    elif manifest.family != family.name:
        reason = f"holds a {manifest.family} encoder, {checkpoint.directory} is {family.name}"
    elif manifest.source != source_hash(family, checkpoint):
        reason = f"was made from another checkpoint than {checkpoint.directory}"
    else:
        return
    raise ToolkitError(
        f"artifact {directory} {reason}; run {_convert_command(checkpoint.directory, directory)} with "
        "--force, or leave --artifact out"
    )


def source_hash(family: Family, checkpoint: Checkpoint) -> str:
    """sha256 (hex) of all that decides what the encoder computes: vision tensors, their table, the tower's settings."""
    import torch

    table = [
        [w.source, [[p.target, p.take, p.at] for p in w.parts]] for w in _vision_weights(family)
    ]
    with torch.device("meta"):
        tower = family.vision_encoder()
    identity = [
        EXPORTER,
        family.name,
        asdict(family.vision),
        _settings(tower),
        table,
        vision_digest(family, checkpoint),
    ]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def vision_digest(family: Family, checkpoint: Checkpoint) -> str:
    return tensors_digest(
        checkpoint, [w.source for w in _vision_weights(family) if w.source in checkpoint.shapes]
    )


def _vision_weights(family: Family) -> list[Weight]:
    return [w for w in family.weights() if any(p.target.startswith("vision.") for p in w.parts)]


def _settings(tower) -> list:
    """Class and public attributes (eps, heads, activation, ...) of every module."""

    def plain(value):
        return getattr(
            value, "__qualname__", value if isinstance(value, (int, float, str)) else repr(value)
        )

    return [
        [
            name,
            type(module).__name__,
            {k: plain(v) for k, v in vars(module).items() if not k.startswith("_")},
        ]
        for name, module in tower.named_modules()
    ]


def cache_directory(source: str) -> Path:
    return cache_root() / "vision" / source[:16]


def ensure(family: Family, checkpoint: Checkpoint, artifact: str | Path | None = None) -> Path:
    """Directory of an artifact that fits: `artifact` itself, else the cached one, converted now if there is none."""
    if artifact is not None:
        check_fits(load(artifact), family, checkpoint, artifact)
        return Path(artifact)
    with spinner("identifying the checkpoint by its vision weights"):
        directory = cache_directory(source_hash(family, checkpoint))
    try:
        check_fits(load(directory), family, checkpoint, directory)
    except ToolkitError:
        print(
            f"no artifact given: converting the vision encoder once, into {directory}",
            file=sys.stderr,
        )
        _convert(checkpoint.directory, directory)
    return directory


def _convert(model: Path, directory: Path):
    """The converter as a process of its own: its memory is given back, and the runtime never imports it."""
    with start_module(
        "convert",
        "--model",
        model.resolve(),
        "--out",
        directory.absolute(),
        "--onnx-only",
        stdout=subprocess.DEVNULL,
    ) as process:
        code = process.wait()
    if code:
        raise ToolkitError(
            f"the conversion of {model} failed (see above); --vision torch works without it", code
        )


def _convert_command(model, directory) -> str:
    return f"`python -m convert --model {model} --out {directory}`"
