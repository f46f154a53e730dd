"""Memory of a long-lived process: what requests of all sizes left behind is the system's again."""

import subprocess
import sys

import paths
import pytest
from service import free_port

from runtime.serve import __main__ as serve
from runtime.ui import __main__ as ui

CODE = """
import re
import sys
import time
from runtime.common.allocator import keep_freed_memory, return_freed_memory_regularly

def resident():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmRSS:\\s+(\\d+)", status.read())[1]) >> 10

if sys.argv[1] == "returned":
    return_freed_memory_regularly(0.05)
keep_freed_memory(1 << 26, 1 << 28)  # as the operators of the CPU do, later than the service
before = resident()
pictures = [bytearray(b"x") * (3 << 20) for _ in range(40)]
kept = [bytes(100_000) for _ in range(10)]  # behind them: the heap cannot shrink
del pictures
end = time.monotonic() + float(sys.argv[2])
while resident() - before > 20 and time.monotonic() < end:
    time.sleep(0.01)
print(resident() - before)
"""


def growth(how: str, seconds: float) -> int:
    """MiB that are left of 120 after at most so many seconds."""
    done = subprocess.run(
        [sys.executable, "-c", CODE, how, str(seconds)],
        cwd=paths.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_holes_are_given_back_whatever_the_operators_keep():
    assert growth("kept", 0) > 100
    assert growth("returned", 30) <= 20


@pytest.mark.parametrize("command, begins", [(serve, "build"), (ui, "open_backend")])
def test_service_and_page_give_memory_back(command, begins, monkeypatch):
    """From before they load their model on."""
    told = []
    monkeypatch.setattr(command, "return_freed_memory_regularly", lambda: told.append(True))
    monkeypatch.setattr(ui, "check_packages", lambda: None)
    for name in ("GRADIO_ANALYTICS_ENABLED", "HF_HUB_OFFLINE", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")  # what the page sets is taken back

    def begin(*options):
        assert told
        raise InterruptedError

    monkeypatch.setattr(command, begins, begin)
    with pytest.raises(InterruptedError):
        command.main(["--model", str(paths.GOLDEN / "glm_edge_v"), "--port", str(free_port())])
