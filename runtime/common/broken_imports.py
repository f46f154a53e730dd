"""Imports that fail for a reason outside Python: takes what was said, returns the command that cures
it. aarch64 machines run out of memory for thread-local data when libgomp is loaded late."""

import platform
import re
from pathlib import Path

TLS = "static TLS block"


def preload_line(message: str) -> str | None:
    """The line to type when an import failed with this message; None when it is another failure."""
    if TLS not in message:
        return None
    named = re.search(r"(/\S*libgomp\S*?):", message)
    library = named[1] if named else installed_libgomp()
    return f"export LD_PRELOAD={library}"


def installed_libgomp(root: Path = Path("/")) -> str:
    """Where the system keeps it: below lib64 in Red Hat's family and openEuler, in Debian's below a
    folder of the machine's name."""
    places = (f"usr/lib/{platform.machine()}-linux-gnu/libgomp.so.1", "usr/lib64/libgomp.so.1")
    found = [place for place in places if (root / place).exists()]
    return f"/{(found or places)[0]}"


def sentence(error: BaseException) -> str | None:
    """What to tell the user about an import that failed so; None when it is another failure."""
    line = preload_line(str(error))
    if line is None:
        return None
    reason = str(error).strip().splitlines()[0]
    return f"a library cannot be loaded ({reason}); run: {line}, then the same command again"
