"""Running atc. Takes a checked command, returns the path of one .om, or raises advice for errors.

atc is a bash wrapper around atc.bin. Every failure exits with 255 and names its causes on stdout,
so success is three things: exit status 0, the success line, and the file, `vision.om` or (with code
for the host) `vision_<os>_<arch>.om`.
"""

import os
import shlex
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from runtime.ascend.cann import HOMES, installed_version
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.files import fresh_folder, new_text
from runtime.common.progress import spinner

from .command import NAME
from .error_advice import advice

SUCCESS = "ATC run success"
SHOWN = 3  # causes named in the message; the log has all
KILLED = 128  # a shell reports a process ended by signal n as 128 + n


@dataclass(frozen=True)
class InstalledAtc:
    """`cann`: the version that atc belongs to, e.g. "8.0.RC2"; None without a version file."""

    atc: Path
    cann: str | None


def find_atc() -> InstalledAtc | None:
    """atc of PATH, else of the CANN directory that set_env.sh names; None without one."""
    homes = [Path(os.environ[name]) for name in reversed(HOMES) if os.environ.get(name)]
    places = os.pathsep.join([os.environ.get("PATH", ""), *(str(home / "bin") for home in homes)])
    found = shutil.which("atc", path=places)
    if not found:
        return None
    atc = Path(found).absolute()
    versions = map(installed_version, [*atc.resolve().parents, *homes])
    return InstalledAtc(atc, next(filter(None, versions), None))


def run_atc(installed: InstalledAtc, arguments: list[str], work_dir: Path, log: Path) -> Path:
    """Path in `work_dir` (emptied first) of the .om that `arguments` make; `log` keeps the output.

    ToolkitError (exit 1) when atc fails, is killed, or does not leave exactly one .om.
    """
    fresh_folder(work_dir)
    with new_text(log) as stream:
        cann = installed.cann or "of unknown version"
        stream.write(f"# in {work_dir}, CANN {cann}\n# {shlex.join(arguments)}\n")
        stream.flush()
        code = _execute([str(installed.atc), *arguments[1:]], work_dir, stream)
        stream.write(f"# exit status {code}\n")
    text = _printed_by_atc(log)
    oms = om_files(work_dir)
    if code == 0 and SUCCESS in text and len(oms) == 1 and oms[0].stat().st_size:
        return oms[0]
    raise ToolkitError(f"{_reason(code, text, oms)}; the log is {log}", CHECK_FAILED)


def om_files(directory: Path) -> list[Path]:
    """What atc may have made there: vision.om, vision_<os>_<arch>.om."""
    return sorted([*directory.glob(f"{NAME}.om"), *directory.glob(f"{NAME}_*_*.om")])


def _printed_by_atc(log: Path) -> str:
    """The log without our own lines."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(line for line in lines if not line.startswith("# "))


def _execute(arguments: list[str], work_dir: Path, stream) -> int:
    """Exit status; when we are interrupted, atc and all it started are killed."""
    try:
        process = subprocess.Popen(
            arguments,
            cwd=work_dir,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    except OSError as error:
        raise ToolkitError(
            f"{arguments[0]} cannot be run ({error.strerror}); install CANN again"
        ) from None
    try:
        with spinner("atc is compiling the vision encoder (minutes)"):
            return process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise


def _reason(code: int, text: str, oms: list[Path]) -> str:
    if code < 0 or KILLED < code < KILLED + signal.NSIG:
        number = -code if code < 0 else code - KILLED
        return (
            f"atc was killed by signal {number}, perhaps for lack of memory; free some, or set "
            "TE_PARALLEL_COMPILER=1, and run the same command again"
        )
    if code == 0 and SUCCESS not in text:
        return (
            "atc ended without its success line, so its output is not trusted; run the same command "
            "again"
        )
    if code == 0:
        return (
            f"atc reports success but left {len(oms)} usable .om files instead of one; check the free "
            "disk space"
        )
    causes = "".join(f"; {cause}" for cause in advice(text)[:SHOWN])
    return f"atc failed (exit status {code}){causes}"
