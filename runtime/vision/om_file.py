"""Which .om runs: takes a Source and what the user named, returns an OmFile, or None for the
ONNX."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.checkpoint import Checkpoint
from models.family import Family
from runtime.ascend.aclruntime import infer_session
from runtime.ascend.host import Host, npu_nodes, parse_npu_smi
from runtime.common.errors import ToolkitError
from runtime.common.notes import note

from .artifact import MANIFEST, OM_VERIFIED, check_fits, known_directory, load, om_file
from .source import Source

GUIDE_OM = "blip2.om"  # where the VisualGLM guide keeps it, beside the checkpoint
UNNAMED_A3 = "Ascend910"  # what npu-smi calls every A3: it hides which one it is


@dataclass(frozen=True)
class OmFile:
    """An .om; whether a manifest of this very checkpoint says that it was verified, and the chip
    it was built for."""

    path: Path
    verified: bool = False
    soc: str | None = None


def om_for_auto(source: Source, artifact: str | Path | None) -> OmFile | None:
    """--vision auto: the .om that `find_om` finds, where an NPU and ais_bench are. Where they are
    not, a note says that it cannot be used."""
    if _is_om(artifact) and not Path(artifact).is_file():
        raise ToolkitError(f"--artifact {artifact} does not exist; give an .om file")
    if not npu_nodes():
        for om in _oms_in_sight(source, artifact):
            note(f"{om} cannot be used here, there is no NPU: the encoder runs on the CPU")
        return None
    om = find_om(source, artifact)
    if om is None:
        return None
    try:
        infer_session()
    except ToolkitError as error:
        note(f"{om.path} cannot be used here ({error}): the encoder runs on the CPU")
        return None
    return om


def onnx_folder(artifact: str | Path | None) -> str | Path | None:
    """Where to look for the ONNX when the user named `artifact`: beside an .om, if there is one."""
    if not _is_om(artifact):
        return artifact
    folder = Path(artifact).parent
    return folder if (folder / MANIFEST).is_file() else None


def om_for_onnx(source: Source, artifact: str | Path | None) -> None:
    """--vision onnx: none. ToolkitError when the user named an .om."""
    if _is_om(artifact):
        raise ToolkitError(
            f"--artifact {artifact} is an .om, which --vision onnx cannot run; use --vision om"
        )


def om_for_om(source: Source, artifact: str | Path | None) -> OmFile:
    """--vision om: the .om that `find_om` finds, verified or not. ToolkitError without one."""
    om = find_om(source, artifact)
    if om is None:
        place = artifact or f"the cache, nor in {source.checkpoint.directory}"
        raise ToolkitError(
            f"no .om in {place}; give one with --artifact FILE.om, or make one with "
            "`python -m convert`"
        )
    return om


OM_FOR: dict[str, Callable] = {"auto": om_for_auto, "onnx": om_for_onnx, "om": om_for_om}


def check_om(family: Family, checkpoint: Checkpoint, artifact: str | Path | None = None):
    """ToolkitError for what `--vision om` lacks: the package (exit 3), the file, a manifest that
    fits."""
    infer_session()
    om_for_om(Source(family, checkpoint), artifact)


def find_om(source: Source, given: str | Path | None = None) -> OmFile | None:
    """The .om at `given`, else that of the artifact which was converted before, else the one beside
    the checkpoint, where the blip2.om of older guides lies; None without any.

    ToolkitError when `given` does not fit the source, or there are several.
    """
    if given is not None:
        return _om_at(Path(given), source)
    folder = known_directory(source)
    om = _om_of_artifact(folder, source) if folder else None
    return om or _om_at(source.checkpoint.directory, source)


def check_chip(om: OmFile):
    """ToolkitError when the manifest names another chip than all that `npu-smi` lists.

    Without a list nothing is known, and nothing refused.
    """
    if om.soc is None:
        return
    _, table = Host().run("npu-smi", "info", timeout=10)
    here = {device.soc for device in parse_npu_smi(table)} - {UNNAMED_A3}
    if here and om.soc not in here:
        raise ToolkitError(
            f"{om.path} was built for {om.soc}, this machine has {', '.join(sorted(here))}; run "
            f"`python -m convert` again with --soc-version {min(here)}"
        )


def _is_om(artifact: str | Path | None) -> bool:
    return str(artifact or "").endswith(".om")


def _om_at(path: Path, source: Source) -> OmFile | None:
    """`path` itself if it is an .om, else the one of the artifact there, else the only one
    there."""
    if path.suffix == ".om":
        return OmFile(path)
    return _om_of_artifact(path, source) or _only_om(path)


def _om_of_artifact(folder: Path, source: Source) -> OmFile | None:
    """The .om that the folder's manifest records, if it still lies there. ToolkitError when the
    artifact does not fit the source."""
    if not (folder / MANIFEST).is_file():
        return None
    manifest = load(folder)
    check_fits(manifest, source, folder)
    path = om_file(manifest, folder)
    if path is None:
        return None
    return OmFile(path, manifest.status == OM_VERIFIED, manifest.soc_version)


def _only_om(folder: Path) -> OmFile | None:
    """The blip2.om of the older guides, else the only .om there."""
    files = sorted(folder.glob("*.om"))
    named = folder / GUIDE_OM
    if named in files:
        return OmFile(named)
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ToolkitError(
            f"{folder} holds {len(files)} .om files ({names}); name one with --artifact"
        )
    return OmFile(files[0]) if files else None


def _oms_in_sight(source: Source, artifact: str | Path | None) -> list[Path]:
    """Where the user may expect one to be used: named, in the folder named, beside the checkpoint.
    The checkpoint's weights are not read for this."""
    if _is_om(artifact):
        return [Path(artifact)]
    return sorted(Path(artifact or source.checkpoint.directory).glob("*.om"))
