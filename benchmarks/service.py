"""The service as a process on 127.0.0.1, with its memory and gauges: shared by the measurements and tests of it."""

import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
HTTP = httpx.Client(timeout=120, trust_env=False)  # one for all: making one is slow
MOST_GROWTH = 0.05  # of the memory
MODEL = ROOT / "tests" / "golden" / "glm_edge_v"  # small, with pictures


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def growth(samples: list[int]) -> float:
    """Relative growth of the median memory from the second tenth of the samples to the last; the first warms up."""
    tenth = max(len(samples) // 10, 1)
    before = statistics.median(samples[tenth : 2 * tenth])
    return statistics.median(samples[-tenth:]) / before - 1


class Client:
    """A client of the service at `self.url`, which a subclass sets."""

    def wait(self, seconds=600):
        """Waits until the service is ready. RuntimeError if it ends or `seconds` pass."""
        end = time.monotonic() + seconds
        while True:
            if time.monotonic() > end or self.ended():
                raise RuntimeError(f"the service did not start {self.ended() or ''}")
            try:
                if HTTP.get(self.url + "/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)

    def ended(self):
        """Why the service will never be ready, as text; None while it may become so."""

    def gauge(self, name: str) -> float:
        """The value of one of the service's metrics."""
        lines = HTTP.get(self.url + "/metrics").text.splitlines()
        own = [line for line in lines if line.startswith(f"ascend_vlm:{name}{{")]
        return sum(float(line.split()[-1]) for line in own)

    @property
    def num_requests(self) -> int:
        """Requests that run or wait."""
        return int(self.gauge("num_requests_running") + self.gauge("num_requests_waiting"))


class Process(Client):
    """Runs `python -m runtime.serve --port N *argv`; `printed` holds the lines of its stderr."""

    def __init__(self, *argv):
        port = free_port()
        self.printed = []
        self.url = f"http://127.0.0.1:{port}"
        flags = ["--port", str(port), "--vision", "torch", "--dtype", "float32", *argv]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "runtime.serve", *flags],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._reader = threading.Thread(
            target=lambda: self.printed.extend(self.process.stderr), daemon=True
        )
        self._reader.start()

    def ended(self):
        return None if self.process.poll() is None else "".join(self.printed)

    @property
    def resident(self) -> int:
        """Resident memory in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) << 10

    def stop(self) -> int:
        """Sends SIGTERM and returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self._reader.join()
        return code
