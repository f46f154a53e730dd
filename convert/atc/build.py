"""From a verified ONNX artifact to an .om: compilation, and the precision ladder on a device.

Takes an artifact directory and a request, returns nothing; the manifest then records the .om.
Without a device the .om is recorded as compiled, not verified. With one it is measured against ONNX
Runtime on the verification images, and the next precision mode is compiled until the family's
threshold holds; an .om that misses it is deleted.
"""

import os
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from models.family import Family
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.files import file_entry, remove_folder
from runtime.common.notes import note
from runtime.vision import artifact
from runtime.vision.artifact import (
    OM_COMPILED,
    OM_VERIFIED,
    ONNX_UNVERIFIED,
    ONNX_VERIFIED,
    WEIGHTS,
    Manifest,
)
from runtime.vision.choose import open_om

from . import golden_features
from .command import ATC_WORK, OmRequest, atc_command, weight_bytes
from .om_check import measure_om
from .run import InstalledAtc, om_files, run_atc

DEVICE = 0  # the first that ASCEND_RT_VISIBLE_DEVICES shows


@dataclass
class OmBuild:
    """One request on its way to an .om; `attempts` = what a device measured, per precision mode."""

    family: Family
    artifact_dir: Path
    request: OmRequest
    installed: InstalledAtc
    attempts: list[dict] = field(default_factory=list)

    def run(self):
        """Compile in the request's precision modes until one is good enough.

        ToolkitError (exit 1) if none is.
        """
        manifest = artifact.load(self.artifact_dir)
        current = self._current_om(manifest)
        if current and manifest.status == OM_VERIFIED:
            print(f"{current} is verified already; nothing to do")
            return
        current_mode = manifest.precision_mode if current else None
        try:
            for mode in self.request.modes:
                om = current if mode == current_mode else self._compile(mode)
                if om and self._accept(om, mode):
                    return
        finally:
            remove_folder(self.artifact_dir / ATC_WORK)
        raise ToolkitError(
            f"no .om was kept: none of {', '.join(self.request.modes)} is as close to ONNX Runtime as "
            f"{self.family.name} needs; use --vision onnx, and report the lines above",
            CHECK_FAILED,
        )

    def _current_om(self, manifest: Manifest) -> Path | None:
        """The intact .om of the artifact, if it is one that this very request would make."""
        mode = manifest.precision_mode
        if not manifest.om or mode not in self.request.modes:
            return None
        if manifest.om["command"] != self._command(mode):
            return None
        if manifest.om["cann"] != self.installed.cann:
            return None
        try:
            return artifact.om_file(manifest, self.artifact_dir)
        except ToolkitError as error:
            note(f"the .om is compiled again: {error}")
            return None

    def _command(self, mode: str) -> list[str]:
        return atc_command(self.request, self.family, mode)

    def _compile(self, mode: str) -> Path | None:
        """The new .om in the work directory.

        None if it does not compile and an earlier mode did; a first mode that does not is an error.
        """
        start = time.perf_counter()
        log = self.artifact_dir / log_name(mode)
        try:
            check_disk(self.artifact_dir, weight_bytes(self.family, mode))
            om = run_atc(self.installed, self._command(mode), self.artifact_dir / ATC_WORK, log)
        except ToolkitError as error:
            if not self.attempts:
                raise
            print(f"{mode}: {error}")
            return None
        seconds = time.perf_counter() - start
        print(f"compiled for {self.request.soc_version} ({mode}) in {seconds:.1f} s")
        return om

    def _accept(self, om: Path, mode: str) -> bool:
        """Publish `om` if it passes, or if nothing here can measure it; delete it otherwise."""
        if not artifact.read_manifest(self.artifact_dir).errors:
            om = self._publish(om, mode, OM_COMPILED)
            print(f"compiled, not verified: {om} (its ONNX is not either: --no-verify)")
            return True
        try:
            session = open_om(om, self.family, DEVICE)
        except ToolkitError as error:
            om = self._publish(om, mode, OM_COMPILED)
            print(
                f"compiled, not verified: {om} ({error})\nto verify it, run the same command where ais_bench and the "
                "NPU are"
            )
            return True
        try:
            golden = golden_features.golden(self.family, self.artifact_dir)
            attempt = measure_om(self.family, session, golden, mode)
        finally:
            session.close()
        self.attempts.append(attempt)
        if not attempt["passed"]:
            self._delete(om)
            return False
        print(f"OM verified: {self._publish(om, mode, OM_VERIFIED)}")
        return True

    def _publish(self, om: Path, mode: str, status: str) -> Path:
        """Move the .om and its weights out of the work directory, then record them in the manifest."""
        manifest = remove_om_record(self.artifact_dir)
        if om.parent != self.artifact_dir:
            om = replace_om(om, self.artifact_dir)
        manifest = replace(
            manifest,
            soc_version=self.request.soc_version,
            precision_mode=mode,
            status=status,
            om=self._record(om, mode),
        )
        artifact.save(self.artifact_dir, manifest)
        return om

    def _record(self, om: Path, mode: str) -> dict:
        """What the manifest says of an .om that lies in the artifact."""
        files = {}
        for path in (om, *sorted((self.artifact_dir / WEIGHTS).glob("*"))):
            files[str(path.relative_to(self.artifact_dir))] = file_entry(path)
        dtype = "uint8" if self.request.aipp else "float16"
        return {
            "files": files,
            "input": {"dtype": dtype, **_shapes(self.family)},
            "gears": list(self.request.gears_for(self.family)),
            "command": self._command(mode),
            "cann": self.installed.cann,
            "log": log_name(mode),
            "attempts": self.attempts,
        }

    def _delete(self, om: Path):
        if om.parent == self.artifact_dir:
            remove_om_record(self.artifact_dir)
        om.unlink()


def _shapes(family: Family) -> dict:
    """Of the one input, or {name: shape} of several."""
    shapes = {name: list(shape) for name, shape in family.vision.inputs.items()}
    return {"shape": next(iter(shapes.values()))} if len(shapes) == 1 else {"shapes": shapes}


def log_name(mode: str) -> str:
    return f"atc_{mode}.log"


def check_disk(artifact_dir: Path, needed: int):
    """ToolkitError unless `needed` bytes are free."""
    free = shutil.disk_usage(artifact_dir).free
    if needed > free:
        raise ToolkitError(
            f"the .om needs {needed / 1e9:.1f} GB in {artifact_dir}, only {free / 1e9:.1f} are free; "
            "free some space, vision.onnx stays as it is"
        )


def remove_om_record(artifact_dir: Path) -> Manifest:
    """Save the manifest without an .om, so that none is recorded while files are replaced."""
    manifest = artifact.read_manifest(artifact_dir)
    manifest = replace(
        manifest,
        soc_version=None,
        precision_mode="fp32",
        status=ONNX_VERIFIED if manifest.errors else ONNX_UNVERIFIED,
        om=None,
    )
    artifact.save(artifact_dir, manifest)
    return manifest


def replace_om(om: Path, artifact_dir: Path) -> Path:
    """Move the .om and its weights into the artifact, in place of older ones; its new path."""
    for old in om_files(artifact_dir):
        old.unlink()
    remove_folder(artifact_dir / WEIGHTS)
    if (om.parent / WEIGHTS).is_dir():
        os.replace(om.parent / WEIGHTS, artifact_dir / WEIGHTS)
    os.replace(om, artifact_dir / om.name)
    return artifact_dir / om.name
