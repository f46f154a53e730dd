"""What the measurements of the service share: the service as a process on 127.0.0.1, its memory, its gauges."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[1]
HTTP = httpx.Client(timeout=120, trust_env=False)  # one for all: making one is slow
MODEL = ROOT / "tests" / "golden" / "glm_edge_v"  # small, with pictures


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class Client:
    """Of the service at self.url."""

    def wait(self, seconds=600):
        """Until it is ready."""
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
        """Why it will never be ready, or None."""

    def gauge(self, name: str) -> float:
        lines = HTTP.get(self.url + "/metrics").text.splitlines()
        return sum(
            float(line.split()[-1]) for line in lines if line.startswith(f"ascend_vlm:{name}{{")
        )


class Process(Client):
    """`python -m runtime.serve --port N *argv`; what it prints is kept."""

    def __init__(self, *argv):
        port = free_port()
        self.printed = []
        self.url = f"http://127.0.0.1:{port}"
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "runtime.serve",
                "--port",
                str(port),
                "--vision",
                "torch",
                "--dtype",
                "float32",
                *argv,
            ],
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
        """Bytes of memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="ascii")
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) << 10

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self._reader.join()
        return code
