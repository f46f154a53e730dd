"""Threads of this process: takes what the system lets it use and what a model needs, returns how
many threads compute.

Workers that wait for each other lose a time slice whenever one of them has no processor, so there
are no more of them than the process may use, one where there is little to compute, and none that
waits spinning for long (see runtime/__init__.py).
"""

import os
from collections.abc import Iterator
from pathlib import Path

VARIABLE = "OMP_NUM_THREADS"
ONE_THREAD_UP_TO = 16 << 20  # bytes read per token: below, waking a second thread costs more
CGROUP2_QUOTA = "cpu.max"
CGROUP1_QUOTA = "cpu.cfs_quota_us"
CGROUP1_PERIOD = "cpu.cfs_period_us"


def for_decoder(bytes_per_token: int, processes: int = 1) -> int:
    """Threads of one of `processes` that read so many bytes of weights for each token."""
    asked = _asked()
    if asked:
        return asked
    if bytes_per_token <= ONE_THREAD_UP_TO:
        return 1
    return max(1, usable() // processes)


def usable(root: Path = Path("/")) -> int:
    """Processors that this process may use: $OMP_NUM_THREADS, else its affinity and the quotas of
    its control groups, rounded down. root: the folder that holds /proc and /sys."""
    asked = _asked()
    if asked:
        return asked
    processors = len(os.sched_getaffinity(0))
    for quota in _quotas(root):
        processors = min(processors, int(quota))
    return max(1, processors)


def _asked() -> int:
    """What $OMP_NUM_THREADS says, of nested levels the first; 0 where it says nothing."""
    text = os.environ.get(VARIABLE, "").split(",")[0].strip()
    return int(text) if text.isdecimal() else 0


def _quotas(root: Path) -> Iterator[float]:
    """Processors that each control group of this process, and each above it, may use."""
    try:
        groups = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            yield from _above(root / "sys/fs/cgroup", path, _quota2)
        elif "cpu" in controllers.split(","):
            for mount in (controllers, "cpu"):
                yield from _above(root / "sys/fs/cgroup" / mount, path, _quota1)


def _above(mount: Path, path: str, quota) -> Iterator[float]:
    """What `quota` says of the group and of those above it, up to the mount. In a container the
    path may be that of the host, of which the mount shows the last part alone."""
    group = mount / path.strip("/")
    while True:
        found = quota(group)
        if found is not None:
            yield found
        if group == mount:
            return
        group = group.parent


def _quota2(group: Path) -> float | None:
    """ "150000 100000" in cpu.max -> 1.5; None for "max", or where there is none."""
    words = _words(group / CGROUP2_QUOTA)
    if len(words) != 2 or words[0] == "max":
        return None
    return int(words[0]) / int(words[1])


def _quota1(group: Path) -> float | None:
    quota = _words(group / CGROUP1_QUOTA)
    period = _words(group / CGROUP1_PERIOD)
    if not quota or not period or int(quota[0]) <= 0:
        return None
    return int(quota[0]) / int(period[0])


def _words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").split()
    except OSError:
        return []
