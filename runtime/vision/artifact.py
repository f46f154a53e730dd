"""The artifact directory: one verified vision encoder, with a manifest of what it was made from.

Takes a Source, returns a directory that fits it: vision.onnx, vision.onnx.data, manifest.json, and
the .om where there is one. The manifest is written last and atomically, so a directory without one
holds nothing usable.
"""

import json
import os
import re
import shlex
import subprocess
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from models.files import is_plain_name, open_regular, read_record
from runtime.common.errors import ToolkitError
from runtime.common.files import cache_folder, problem_of, write_atomically
from runtime.common.notes import note
from runtime.common.processes import start_module
from runtime.common.progress import spinner

from .registry import registered_folder
from .source import EXPORTER, Source, check_exporter

MANIFEST = "manifest.json"
ONNX = "vision.onnx"
DATA = "vision.onnx.data"
ONNX_VERIFIED = "onnx verified"
ONNX_UNVERIFIED = "onnx not verified"
OM_COMPILED = "om compiled, not verified"
OM_VERIFIED = "om verified"
ONNX_NAMES = {ONNX, DATA}  # what the exporter writes
OM_NAME = re.compile(r"vision(_\w+)?\.om")  # what atc writes
WEIGHTS = "weight"  # where atc puts --external_weight, and where the runtime looks for it


@dataclass
class Manifest:
    """manifest.json. `source` is the hash of a Source; `input` and `output` are {name, shape,
    dtype}, `input` a list of them where there are several; `files` is {name: {bytes, sha256}};
    `errors` maps each verification image to what was measured against torch in fp32, {} if nothing
    was.

    With an .om, `soc_version` and `precision_mode` are the .om's, and `om` holds the rest: files
    {name: {bytes, sha256}} (the .om first), input {dtype, shape}, gears (batch sizes), command,
    cann (version), log, attempts (precision mode, cosine, distance, latency_ms of each .om measured
    on a device, the kept one last).
    """

    source: str
    family: str
    opset: int
    input: dict | list
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
    missing or damaged. The files are read once per state (runtime/common/files)."""
    artifact_dir = Path(artifact_dir)
    manifest = read_manifest(artifact_dir)
    _check_files(artifact_dir, manifest.files)
    return manifest


def read_manifest(artifact_dir: Path) -> Manifest:
    """manifest.json, which names only files that the toolkit writes; ToolkitError if there is
    none."""
    path = artifact_dir / MANIFEST
    again = f"make it with {_convert_command('CHECKPOINT', artifact_dir)}"
    if not path.exists():
        raise ToolkitError(f"artifact {artifact_dir} {_what_lacks(artifact_dir)}; {again}")
    try:
        with open_regular(path) as stream:
            manifest = Manifest(**read_record(stream))
        _check_names(manifest)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ToolkitError(
            f"{path} is not a manifest this version can read; "
            f"make it again with {_convert_command('CHECKPOINT', artifact_dir)}"
        ) from None
    return manifest


def _check_names(manifest: Manifest):
    """ValueError unless the exporter's files are all listed, and every other one is one that atc
    writes, each with its size and sha256: what is not listed would not be checked."""
    om_files = (manifest.om or {}).get("files", {})
    if set(manifest.files) != ONNX_NAMES or not all(map(_is_om_name, om_files)):
        raise ValueError("other names than ours")
    for entry in (*manifest.files.values(), *om_files.values()):
        int(entry["bytes"])
        entry["sha256"].encode()


def _is_om_name(name: str) -> bool:
    """vision.om, vision_linux_aarch64.om, or a file in the folder of its weights."""
    folder, _, file = name.rpartition("/")
    if folder:
        return folder == WEIGHTS and is_plain_name(file)
    return OM_NAME.fullmatch(name) is not None


def _what_lacks(artifact_dir: Path) -> str:
    if artifact_dir.is_dir():
        return "has no manifest.json"
    return "is a file" if artifact_dir.exists() else "does not exist"


def _check_files(artifact_dir: Path, files: dict):
    """ToolkitError for the first that is not as recorded."""
    for name, entry in files.items():
        if problem := problem_of(artifact_dir / name, entry):
            command = _convert_command("CHECKPOINT", artifact_dir)
            raise ToolkitError(f"{artifact_dir / name} {problem}; make it again with {command}")


def publish(work_dir: Path, artifact_dir: Path, manifest: Manifest):
    """Move the manifest's files from `work_dir` (on the same file system) into `artifact_dir`.

    Killed at any moment, it leaves a complete artifact or a directory without a manifest.
    """
    (artifact_dir / MANIFEST).unlink(missing_ok=True)
    for name in manifest.files:
        os.replace(work_dir / name, artifact_dir / name)
    save(artifact_dir, manifest)


def save(artifact_dir: Path, manifest: Manifest):
    write_atomically(artifact_dir / MANIFEST, json.dumps(asdict(manifest), indent=2) + "\n")


def mark_verified(artifact_dir: Path, errors: dict):
    """Record what was measured against torch after the artifact was made."""
    manifest = read_manifest(artifact_dir)
    status = ONNX_VERIFIED if manifest.status == ONNX_UNVERIFIED else manifest.status
    save(artifact_dir, replace(manifest, errors=errors, status=status))


def om_file(manifest: Manifest, artifact_dir: str | Path) -> Path | None:
    """The .om of the manifest; None without one. ToolkitError when it or its weights are no longer
    as recorded."""
    artifact_dir = Path(artifact_dir)
    files = (manifest.om or {}).get("files", {})
    _check_files(artifact_dir, files)
    return artifact_dir / next(iter(files)) if files else None


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
    return cache_folder("vision") / source.hash[:16]


def find_or_convert(source: Source, artifact: str | Path | None = None) -> Path:
    """Directory of an artifact that fits `source`: `artifact` itself, else one that was converted
    before, else the cached one, converted now.

    ToolkitError if `artifact` does not fit, or if the conversion fails.
    """
    if artifact is not None:
        check_fits(load(artifact), source, artifact)
        return Path(artifact)
    with spinner("identifying the checkpoint by its vision weights"):
        known = known_directory(source)
    if known:
        return known
    check_exporter()
    cached = cache_directory(source)
    note(f"no artifact given: converting the vision encoder once, into {cached}")
    _convert(source.checkpoint.directory, cached)
    return cached


def known_directory(source: Source) -> Path | None:
    """Where an artifact that fits `source` lies: the folder that `python -m convert` wrote last,
    else the cache's; None where neither holds one that is whole."""
    for folder in (registered_folder(source.hash), cache_directory(source)):
        if folder is None:
            continue
        try:
            check_fits(load(folder), source, folder)
            return folder
        except ToolkitError as error:
            if (folder / MANIFEST).exists():
                note(f"the vision encoder in {folder} is not used and made again: {error}")
    return None


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
    folders = ["--model", str(model_dir), "--out", str(artifact_dir)]
    return f"`{shlex.join(['python', '-m', 'convert', *folders])}`"
