"""Checks of CANN: the toolkit, its environment, the chip's kernels, and ATB.

Takes a Host, the toolkit in use and the chips (["ascend910b"]), returns Checks.
"""

import shlex
from pathlib import Path

from runtime.ascend.cann import HOMES, Toolkit, numbers
from runtime.ascend.host import Host

from .check import ARCH, DOWNLOADS, MISMATCH, MISSING, NOTE, OK, VERSIONS, WARNING, Check

ATB_INFO = "/usr/local/Ascend/nnal/atb/latest/version.info"
SPLIT_PACKAGES = (8, 5)  # CANN from which the kernels are called ops


def active_toolkit(host: Host) -> Toolkit | None:
    """The toolkit the environment points to, else the newest one installed."""
    toolkits = host.toolkits()
    if any(host.environ.get(name) for name in HOMES):
        return next(iter(toolkits), None)
    return max(toolkits, key=lambda toolkit: numbers(toolkit.version), default=None)


def toolkit_install(version: str) -> str:
    """The shell command that installs it."""
    return f"./Ascend-cann-toolkit_{version}_linux-{ARCH}.run --install   # {DOWNLOADS}"


def toolkit_checks(host: Host, toolkit: Toolkit | None, chips: list[str]) -> list[Check]:
    """The toolkit, its environment, and the kernels of every chip."""
    if toolkit is None:
        return [Check("CANN toolkit", MISSING, "none found", toolkit_install("<version>"))]
    found = f"{toolkit.version} in {toolkit.path}"
    others = _others(host, toolkit)
    if others:
        found += f" (also here: {versions(others)})"
    kernels = [_kernels(toolkit, chip) for chip in chips]
    return [Check("CANN toolkit", OK, found), _environment(host, toolkit), *kernels]


def _others(host: Host, toolkit: Toolkit) -> list[Toolkit]:
    others = []
    for other in host.toolkits():
        if other.path.resolve() != toolkit.path.resolve():
            others.append(other)
    return others


def versions(toolkits: list[Toolkit]) -> str:
    """ "8.3.RC1, 9.1.0" """
    return ", ".join(toolkit.version for toolkit in toolkits)


def _environment(host: Host, toolkit: Toolkit) -> Check:
    """Whether set_env.sh of that toolkit, and of no other, was sourced in this shell."""
    fix = f"source {shlex.quote(str(toolkit.set_env))}"
    home = host.environ.get("ASCEND_HOME_PATH") or host.environ.get("ASCEND_TOOLKIT_HOME")
    if not home:
        return Check("environment", MISMATCH, "set_env.sh was not sourced in this shell", fix)
    if not host.path(home).exists():
        found = f"ASCEND_HOME_PATH is {home}, which is not there"
        return Check("environment", MISMATCH, found, fix)
    libraries = _library_folders(host)
    if not _any_below(libraries, toolkit):
        return Check("environment", MISMATCH, f"LD_LIBRARY_PATH has nothing of {home}", fix)
    mixed = [other for other in _others(host, toolkit) if _any_below(libraries, other)]
    if mixed:
        return Check(
            "environment",
            MISMATCH,
            f"LD_LIBRARY_PATH mixes CANN {toolkit.version} with {versions(mixed)}",
            f"env -u LD_LIBRARY_PATH bash -l   # then: {fix}",
        )
    opp = host.environ.get("ASCEND_OPP_PATH", "")
    if not opp or not host.path(opp).exists():
        return Check("environment", MISMATCH, f"ASCEND_OPP_PATH is {opp or 'not set'}", fix)
    return Check("environment", OK, f"set_env.sh of {home}")


def _library_folders(host: Host) -> list[Path]:
    """Of LD_LIBRARY_PATH."""
    parts = host.environ.get("LD_LIBRARY_PATH", "").split(":")
    return [host.path(part).resolve() for part in parts if part]


def _any_below(folders: list[Path], toolkit: Toolkit) -> bool:
    home = toolkit.path.resolve()
    return any(folder.is_relative_to(home) for folder in folders)


def _kernels(toolkit: Toolkit, chip: str) -> Check:
    """The operator package of the chip is installed apart from the toolkit; without it every
    operator fails (561103)."""
    folder = toolkit.path / "opp/built-in/op_impl/ai_core/tbe/kernel" / chip
    if folder.is_dir() and len(list(folder.iterdir())) > 1:
        return Check("CANN kernels", OK, f"for {chip}")
    short = chip.removeprefix("ascend")
    name = f"Ascend-cann-kernels-{short}"
    if numbers(toolkit.version) >= SPLIT_PACKAGES:
        name = f"Ascend-cann-{short}-ops"
    fix = f"./{name}_{toolkit.version}_linux-{ARCH}.run --install"
    return Check("CANN kernels", MISSING, f"none for {chip} in {folder}", fix)


def atb(host: Host, toolkit: Toolkit | None, chips: list[str]) -> Check:
    """Only some chips need it; of the others what is wrong with it is a note or a warning."""
    name = "NNAL (ATB)"
    home = host.environ.get("ATB_HOME_PATH", "")
    version = host.info(ATB_INFO).get("Ascend-cann-atb")
    needed = bool(set(chips) & set(VERSIONS["needs_atb"]))
    if version is None and not home:
        fix = _atb_install(toolkit.version if toolkit else "<version>")
        if needed:
            return Check(name, MISSING, "not installed", fix)
        return Check(name, NOTE, "not installed (310P needs it)", fix)
    if toolkit and version and numbers(version)[:2] != numbers(toolkit.version)[:2]:
        status = MISMATCH if needed else WARNING
        found = f"{version} beside CANN {toolkit.version}"
        return Check(name, status, found, _atb_install(toolkit.version))
    if not home:
        status = MISMATCH if needed else NOTE
        fix = "source /usr/local/Ascend/nnal/atb/set_env.sh"
        return Check(name, status, f"{version}, its set_env.sh was not sourced", fix)
    return Check(name, OK, version or home)


def _atb_install(version: str) -> str:
    return f"./Ascend-cann-nnal_{version}_linux-{ARCH}.run --install"
