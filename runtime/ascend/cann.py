"""Installed CANN toolkits: takes a folder, returns what CANN's installer wrote there about it.

Reads only; nothing is imported or loaded.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")  # set_env.sh exports the toolkit's folder
INSTALL_INFO = "*-linux/ascend_toolkit_install.info"


@dataclass(frozen=True)
class Toolkit:
    """One installed CANN toolkit. `info`: its ascend_toolkit_install.info."""

    path: Path
    info: Mapping[str, str]

    @property
    def version(self) -> str:
        return self.info.get("version", "")

    @property
    def set_env(self) -> Path:
        """set_env.sh lies inside a `cann` folder, and beside the version folders of an
        `ascend-toolkit`."""
        inside = self.path / "set_env.sh"
        if inside.is_file() or self.path.parent.name != "ascend-toolkit":
            return inside
        return self.path.parent / "set_env.sh"


def toolkit_in(folder: Path) -> Toolkit | None:
    """The toolkit installed in `folder`; None where no installer left its info."""
    files = sorted(folder.glob(INSTALL_INFO))
    return Toolkit(folder, read_info(files[0])) if files else None


def installed_version(folder: Path) -> str | None:
    """CANN version of the toolkit in `folder`, e.g. "8.0.RC2"; None where it is not known."""
    for file in sorted(folder.glob(INSTALL_INFO)):
        version = read_info(file).get("version", "")
        if len(numbers(version)) > 1:
            return version
    return None


def read_info(path: Path) -> dict[str, str]:
    """Pairs of a version.info file ("key=value" or "key : value"), {} without it."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    pairs = {}
    for line in lines:
        key, *value = re.split(r"\s*[=:]\s*", line.strip(), maxsplit=1)
        if value:
            pairs[key] = value[0].strip()
    return pairs


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers, to compare versions: "8.3.RC1" -> (8, 3), "7.7.0.1" -> (7, 7, 0, 1)."""
    leading = re.match(r"\d+(\.\d+)*", version or "")
    return tuple(map(int, leading[0].split("."))) if leading else ()
