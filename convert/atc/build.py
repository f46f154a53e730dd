"""From the verified ONNX to an .om: files for ATC, the compilation, and the precision ladder on a device.

Without a device the .om is recorded as compiled, not verified. With one it is measured against ONNX Runtime on the
pictures of `verify`, and precision modes are climbed until the family's threshold holds; an .om below it is thrown away.
"""

import functools
import os
import shlex
import shutil
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from convert.verify.comparison import compare
from models.family import Family
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.files import write_atomically
from runtime.common.metrics import compare_rows
from runtime.vision import artifact
from runtime.vision.artifact import OM_COMPILED, OM_VERIFIED, ONNX, ONNX_VERIFIED, Manifest
from runtime.vision.om_session import open_om

from . import command as atc
from . import golden_features as reference
from . import graph_variant as variant
from . import option_rules as atc_options
from . import run as atc_run
from .command import AIPP, MIXLIST, VARIANT, WORK, Request

DISTANCE = 0.05  # largest |om - onnx| / |onnx| of all features, beside the family's cosine
DEVICE = 0  # the first that ASCEND_RT_VISIBLE_DEVICES shows
WEIGHTS = "weight"  # where atc puts --external_weight, and where the runtime looks for it
RUNS = 5  # timed, after one that is not


def check(family: Family, request: Request, toolkit: atc_run.InstalledAtc | None):
    """ToolkitError, before anything slow begins, for what atc (without one: of any CANN version) would refuse."""
    atc.check(request, family, toolkit and toolkit.cann)
    if request.aipp:
        variant.normalization(family)


def plan(family: Family, out: Path, request: Request, toolkit: atc_run.InstalledAtc | None) -> str:
    """What --dry-run prints: which atc would run where, on which files."""
    who = (
        f"{toolkit.atc}, CANN {toolkit.cann or 'of unknown version'}"
        if toolkit
        else "no atc is installed here; checked against the options of CANN 7.0 to 9.x"
    )
    files = [request.graph, *([AIPP] if request.aipp else [])]
    return f"{who}\nconvert would write {' and '.join(files)} to {out}, then run " + _shown(
        family, out, request
    )


def next_step(family: Family, out: Path, request: Request) -> str:
    """For a user without CANN."""
    return (
        f"where CANN is installed, run the same command, or `sh {out / 'atc.sh'}`, which runs "
        + _shown(family, out, request)
    )


def _shown(family, out, request):
    return f"in {out / WORK}:\n  " + shlex.join(atc.command(request, family, request.modes[0]))


def prepare(family: Family, out: Path, request: Request):
    """Beside vision.onnx: atc.sh and the files its command names, the graph among them proved to compute the same."""
    if request.aipp:
        write_atomically(out / AIPP, variant.aipp_config(family))
    if request.graph == VARIANT:
        _prepare_graph(family, out, request)
    if any(mode.startswith(atc_options.MIXED) for mode in request.modes):
        write_atomically(out / MIXLIST, atc.mixlist())
    write_atomically(out / "atc.sh", atc.script(atc.command(request, family, request.modes[0])))


def _prepare_graph(family, out, request):
    candidate = out / f".{VARIANT}"
    try:
        variant.write(family, out, request, candidate)
        if (out / VARIANT).is_file() and candidate.read_bytes() == (out / VARIANT).read_bytes():
            return
        found = reference.features(family, candidate, out / AIPP if request.aipp else None)
        result = compare(golden(family, out), found)
        print(f"verify {VARIANT}: {result}: {'pass' if result.passed else 'FAIL'}")
        if not result.passed:
            raise ToolkitError(
                f"{VARIANT} and vision.onnx disagree; report this with the line above", CHECK_FAILED
            )
        os.replace(candidate, out / VARIANT)
    finally:
        candidate.unlink(missing_ok=True)


@functools.lru_cache(maxsize=1)
def golden(family: Family, out: Path) -> np.ndarray:
    """Features of vision.onnx, which a variant of it and every .om are held against; computed once per conversion."""
    return reference.features(family, out / ONNX)


@dataclass
class Build:
    """One request on its way to an .om; `attempts` = what a device measured, per precision mode."""

    family: Family
    out: Path
    request: Request
    toolkit: atc_run.InstalledAtc
    attempts: list[dict] = field(default_factory=list)

    def run(self):
        """Compile in the request's precision modes until one is good enough; ToolkitError (exit 1) if none is."""
        manifest = artifact.load(self.out)
        kept = self._current(manifest)
        if kept and manifest.status == OM_VERIFIED:
            return print(f"{kept} is verified already; nothing to do")
        try:
            for mode in self.request.modes:
                made = kept if kept and mode == manifest.precision_mode else self._compile(mode)
                if made and self._settle(made, mode):
                    return None
        finally:
            shutil.rmtree(self.out / WORK, ignore_errors=True)
        raise ToolkitError(
            f"no .om was kept: none of {', '.join(self.request.modes)} is as close to ONNX Runtime as "
            f"{self.family.name} needs; use --vision onnx, and report the lines above",
            CHECK_FAILED,
        )

    def _current(self, manifest: Manifest) -> Path | None:
        """The intact .om of the artifact, if it is one that this very request would make."""
        mode = manifest.precision_mode
        same = (
            manifest.om
            and mode in self.request.modes
            and manifest.om["command"] == self._command(mode)
        )
        return (
            artifact.om_file(manifest, self.out)
            if same and manifest.om["cann"] == self.toolkit.cann
            else None
        )

    def _command(self, mode: str) -> list[str]:
        return atc.command(self.request, self.family, mode)

    def _compile(self, mode: str) -> Path | None:
        """The new .om in the work folder; None if a later mode than the first does not compile."""
        start = time.perf_counter()
        try:
            check_disk(self.out, atc.weight_bytes(self.family, mode))
            made = atc_run.run(
                self.toolkit, self._command(mode), self.out / WORK, self.out / log_name(mode)
            )
        except ToolkitError as error:
            if not self.attempts:
                raise
            return print(f"{mode}: {error}")
        print(
            f"compiled for {self.request.soc_version} ({mode}) in {time.perf_counter() - start:.1f} s"
        )
        return made

    def _settle(self, made: Path, mode: str) -> bool:
        """Publish `made` if it passes, or if nobody here can measure it; remove it otherwise."""
        try:
            session = open_om(made, self.family.vision, DEVICE)
        except ToolkitError as error:
            made = self._publish(made, mode, OM_COMPILED)
            print(
                f"compiled, not verified: {made} ({error})\nto verify it, run the same command where ais_bench and the "
                "NPU are"
            )
            return True
        try:
            self.attempts.append(measure(self.family, session, golden(self.family, self.out), mode))
        finally:
            session.close()
        if not self.attempts[-1]["passed"]:
            discard(self.out, made)
            return False
        print(f"OM verified: {self._publish(made, mode, OM_VERIFIED)}")
        return True

    def _publish(self, made: Path, mode: str, status: str) -> Path:
        """Move the .om and its weights out of the work folder, and record them; the manifest comes last."""
        plain = forget(self.out)
        if made.parent != self.out:
            made = take(made, self.out)
        weights = sorted((self.out / WEIGHTS).glob("*")) if (self.out / WEIGHTS).is_dir() else []
        shape = self.family.vision.input_shape
        om = {
            "files": {
                str(path.relative_to(self.out)): artifact.file_entry(path)
                for path in (made, *weights)
            },
            "input": {"dtype": "uint8" if self.request.aipp else "float16", "shape": list(shape)},
            "gears": list(self.request.gears),
            "command": self._command(mode),
            "cann": self.toolkit.cann,
            "log": log_name(mode),
            "attempts": self.attempts,
        }
        artifact.save(
            self.out,
            replace(
                plain,
                soc_version=self.request.soc_version,
                precision_mode=mode,
                status=status,
                om=om,
            ),
        )
        return made


def log_name(mode: str) -> str:
    return f"atc_{mode}.log"


def measure(family: Family, session, golden: np.ndarray, mode: str) -> dict:
    """The record of one .om on a device: lowest row cosine and relative distance to `golden`, ms per picture."""
    raw = reference.pixels(family)
    try:
        found = session.encode(raw)
        latency = float(np.median([_timed(session, raw[:1]) for _ in range(RUNS)]))
    except ToolkitError as error:  # NaN or Inf
        print(f"verify OM {mode}: {error}: FAIL")
        return {"mode": mode, "passed": False, "error": str(error)}
    width = golden.shape[-1]
    cosine = float(
        compare_rows(golden.reshape(-1, width), found.reshape(-1, width))["cosine"].min()
    )
    distance = float(np.linalg.norm(found - golden) / np.linalg.norm(golden))
    passed = bool(golden.size and cosine >= family.encoder_cosine and distance <= DISTANCE)
    print(
        f"verify OM {mode}: lowest row cosine {cosine:.6f} (limit {family.encoder_cosine}), distance {distance:.2g} "
        f"(limit {DISTANCE}), {latency:.2f} ms: {'pass' if passed else 'FAIL'}"
    )
    return {
        "mode": mode,
        "passed": passed,
        "cosine": cosine,
        "distance": distance,
        "latency_ms": latency,
    }


def _timed(session, raw) -> float:
    start = time.perf_counter()
    session.encode(raw)
    return 1000 * (time.perf_counter() - start)


def check_disk(out: Path, need: int):
    free = shutil.disk_usage(out).free
    if need > free:
        raise ToolkitError(
            f"the .om needs {need / 1e9:.1f} GB in {out}, only {free / 1e9:.1f} are free; free some space, "
            "vision.onnx stays as it is"
        )


def forget(out: Path) -> Manifest:
    """The manifest without an .om, saved: from here on no file is called one until it is whole."""
    plain = replace(
        artifact.load(out), soc_version=None, precision_mode="fp32", status=ONNX_VERIFIED, om=None
    )
    artifact.save(out, plain)
    return plain


def discard(out: Path, made: Path):
    if made.parent == out:
        forget(out)
    made.unlink()


def take(made: Path, out: Path) -> Path:
    """Move the .om and its weight folder into `out`, in place of older ones."""
    for old in (*out.glob(f"{atc.NAME}.om"), *out.glob(f"{atc.NAME}_*_*.om")):
        old.unlink()
    shutil.rmtree(out / WEIGHTS, ignore_errors=True)
    if (made.parent / WEIGHTS).is_dir():
        os.replace(made.parent / WEIGHTS, out / WEIGHTS)
    os.replace(made, out / made.name)
    return out / made.name
