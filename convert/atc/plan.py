"""What atc would run. Takes a request, returns the lines that are printed where atc is not run."""

import shlex
from pathlib import Path

from models.family import Family

from .aipp import normalization
from .command import AIPP, ATC_WORK, SCRIPT, OmRequest, atc_command, check_modes
from .patch_gears import check_gears
from .run import InstalledAtc


def check_request(family: Family, request: OmRequest, installed: InstalledAtc | None):
    """ToolkitError, before anything slow begins, for what atc would refuse.

    Without an installed atc: for what every CANN version would refuse.
    """
    check_gears(family, request.gears, request.patch_gears, request.aipp)
    check_modes(request, family, installed.cann if installed else None)
    if request.aipp:
        normalization(family)


def dry_run(
    family: Family, artifact_dir: Path, request: OmRequest, installed: InstalledAtc | None
) -> str:
    """Which atc would run where, on which files."""
    if installed:
        tool = f"{installed.atc}, CANN {installed.cann or 'of unknown version'}"
    else:
        tool = "no atc is installed here; checked against the options of CANN 7.0 to 9.x"
    files = f"{request.graph} and {AIPP}" if request.aipp else request.graph
    command = _described(family, artifact_dir, request)
    return f"{tool}\nconvert would write {files} to {artifact_dir}, then run {command}"


def next_step(family: Family, artifact_dir: Path, request: OmRequest) -> str:
    """For a user without CANN: what compiles the artifact where CANN is installed."""
    command = _described(family, artifact_dir, request)
    return (
        "where CANN is installed, run the same command, or "
        f"`sh {shlex.quote(str(artifact_dir / SCRIPT))}`, which runs {command}"
    )


def _described(family: Family, artifact_dir: Path, request: OmRequest) -> str:
    command = atc_command(request, family, request.modes[0])
    return f"in {artifact_dir / ATC_WORK}:\n  {shlex.join(command)}"
