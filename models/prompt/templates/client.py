"""Rendering in another process. Takes a template's source and its variables, returns the text or a ModelError.

One process serves all templates of this one; it is started when a model is loaded or with the first, and anew after one that it did not survive.
"""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

from models.errors import ModelError

ROOT = Path(__file__).resolve().parents[3]
PROCESS = "models.prompt.templates.process"


class TemplateProcess:
    """The process, shared by the threads of this one; a forked child starts its own."""

    def __init__(self):
        self._lock = threading.Lock()
        self._process = None
        self._owner = None

    def start(self):
        """Starts it, where it does not run, and returns at once: it is ready when the first
        template comes."""
        with self._lock:
            self._start_if_needed()

    def ask(self, source: str, variables: dict | None, origin: str) -> str:
        """The rendered text; variables None: "parts" or "string", the form of content that it reads."""
        try:
            request = json.dumps({"source": source, "variables": variables}).encode() + b"\n"
        except (RecursionError, TypeError, ValueError):
            raise ModelError("messages or tools are no JSON values, or nested too deeply") from None
        with self._lock:
            line = self._exchange(request)
        if not line.endswith(b"\n"):
            raise ModelError(
                f"{origin} does not come to an end in time, or takes more memory than any prompt needs; "
                "take the template from the release"
            )
        result = json.loads(line)
        if "error" in result:
            raise ModelError(f"{origin} {result['error']}; take the template from the release")
        return result["text"]

    def _exchange(self, request: bytes) -> bytes:
        self._start_if_needed()
        try:
            self._process.stdin.write(request)
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:  # it died while it was written to
            line = b""
        if not line.endswith(b"\n"):
            self._process.kill()
            self._process.wait()
            self._process = None
        return line

    def _start_if_needed(self):
        if self._process and self._owner == os.getpid() and self._process.poll() is None:
            return
        self._owner = os.getpid()
        self._process = subprocess.Popen(
            [sys.executable, "-m", PROCESS],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl+C in a chat is not for it
        )


PROCESS_OF_TEMPLATES = TemplateProcess()
os.register_at_fork(after_in_child=PROCESS_OF_TEMPLATES.__init__)
