"""Running atc: a checked command in, the path of one .om out, or one sentence with the advice for its error codes.

atc is a bash wrapper around atc.bin. Every failure exits with 255 and names its causes on stdout, so success is three
things: exit status 0, the success line, and the file, `vision.om` or (with code for the host) `vision_<os>_<arch>.om`.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from runtime.ascend.cann import HOMES, installed_version
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.progress import spinner

from .command import NAME

SUCCESS = "ATC run success"
CODE = re.compile(r"\b[EWI][0-9A-Z]\d{4}\b")
SHOWN = 3  # causes named in the message; the log has all
KILLED = 128  # a shell reports a process ended by signal n as 128 + n


@dataclass(frozen=True)
class InstalledAtc:
    """An installed atc and the CANN version it belongs to, e.g. "8.0.RC2" (None where no version file is found)."""

    atc: Path
    cann: str | None


def find() -> InstalledAtc | None:
    """atc of PATH, else of the CANN folder that set_env.sh names; None without one."""
    homes = [Path(os.environ[name]) for name in reversed(HOMES) if os.environ.get(name)]
    places = os.pathsep.join([os.environ.get("PATH", ""), *(str(home / "bin") for home in homes)])
    found = shutil.which("atc", path=places)
    if not found:
        return None
    atc = Path(found).absolute()
    versions = map(installed_version, [*atc.resolve().parents, *homes])
    return InstalledAtc(atc, next(filter(None, versions), None))


def run(toolkit: InstalledAtc, arguments: list[str], work: Path, log: Path) -> Path:
    """Path in `work` (emptied first) of the .om that `arguments` make; what atc says is kept in `log`.

    ToolkitError (exit 1) when atc fails, is killed, or does not leave exactly one .om.
    """
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    with open(log, "w", encoding="utf-8") as stream:
        stream.write(
            f"# in {work}, CANN {toolkit.cann or 'of unknown version'}\n# {shlex.join(arguments)}\n"
        )
        stream.flush()
        code = _execute([str(toolkit.atc), *arguments[1:]], work, stream)
        stream.write(f"# exit status {code}\n")
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("# "))  # atc's own words
    made = sorted([*work.glob(f"{NAME}.om"), *work.glob(f"{NAME}_*_*.om")])
    if code == 0 and SUCCESS in text and len(made) == 1 and made[0].stat().st_size:
        return made[0]
    raise ToolkitError(f"{_reason(code, text, made)}; the log is {log}", CHECK_FAILED)


def _execute(arguments: list[str], work: Path, stream) -> int:
    """Exit status; atc and all it started end with us."""
    try:
        process = subprocess.Popen(
            arguments,
            cwd=work,
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


def _reason(code: int, text: str, made: list) -> str:
    if code < 0 or KILLED < code < KILLED + signal.NSIG:
        number = -code if code < 0 else code - KILLED
        return (
            f"atc was killed by signal {number}, perhaps for lack of memory; free some, or set "
            "TE_PARALLEL_COMPILER=1, and run the same command again"
        )
    if code == 0 and SUCCESS not in text:
        return "atc ended without its success line, so its output is not trusted; run the same command again"
    if code == 0:
        return f"atc reports success but left {len(made)} usable .om files instead of one; check the free disk space"
    causes = advice(text)
    return f"atc failed (exit status {code})" + "".join(f"; {cause}" for cause in causes[:SHOWN])


def advice(text: str) -> list[str]:
    """For every error code and known phrase in atc's output: code, meaning and what to do, in the user's language."""
    table = json.loads(Path(__file__).with_name("error_advice.json").read_text(encoding="utf-8"))
    found = {phrase: entry for phrase, entry in table["phrases"].items() if phrase in text}
    found |= {code: _entry(table, code) for code in CODE.findall(text) if code.startswith("E")}
    return [_sentence(name, entry, text) for name, entry in found.items() if entry]


def _entry(table: dict, code: str) -> dict | None:
    families = [start for start in table["families"] if code.startswith(start)]
    return table["codes"].get(code) or table["families"].get(max(families, key=len, default=None))


def _sentence(name: str, entry: dict, text: str) -> str:
    meaning, action = entry[language()]
    line = next(line for line in text.splitlines() if name in line)
    return f"{name}: {meaning} ({line.strip()[:200]}): {action}"


def language() -> str:
    """ "zh" in a Chinese locale, else "en"."""
    name = next(filter(None, (os.environ.get(n) for n in ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    return "zh" if name.startswith("zh") else "en"
