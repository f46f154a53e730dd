"""The other processes of a split model that rank 0 starts on its own machine, and how each of them
ends: takes ranks, starts them, and ends everything when one dies."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from runtime.common.errors import CHECK_FAILED, MISSING_COMPONENT
from runtime.common.processes import ROOT, module_command
from runtime.common.progress import print_status

FOLDER = "ASCEND_VLM_TEAM"  # names the private folder of rank 0 to a process that we started
FOLLOWER = "runtime.engine.follower"  # module of a process that we start

workers: list[subprocess.Popen] = []  # that this process started
_ending = threading.Lock()


def start_workers(size: int, folder: Path):
    """Start ranks 1 to size - 1, which meet in `folder`, each with a thread that waits for its
    end."""
    terminal = _terminal_settings()
    for rank in range(1, size):
        watcher = Watcher(rank, size, folder, terminal)
        threading.Thread(target=watcher.run, daemon=True).start()


def end_workers():
    """End the ranks that this process started."""
    ended = workers[:]
    workers.clear()  # first: their watchers see that this is no failure
    for worker in ended:
        worker.kill()
        worker.wait()


@dataclass
class Watcher:
    """Starts rank `rank` of `size` and waits for its end. folder: where they meet;
    terminal: settings to restore."""

    rank: int
    size: int
    folder: Path
    terminal: list | None

    def run(self):
        """Starts one rank and waits; when it exits, all ranks are terminated.

        The thread lives as long as the process that it started, because the kernel kills that
        process (processes.die_with_parent) when this thread ends.
        """
        with tempfile.TemporaryFile() as output:
            try:
                worker = self._start(output)
            except OSError as error:  # rank 0 would wait for it
                self._end_all(CHECK_FAILED, str(error))
            workers.append(worker)
            code = worker.wait()
            if worker in workers:  # not closed by us
                output.seek(0)
                self._end_all(code, output.read().decode(errors="replace").strip())

    def _start(self, output) -> subprocess.Popen:
        return subprocess.Popen(
            module_command(FOLLOWER, os.getpid()),
            env={**os.environ, **self._environment()},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def _environment(self) -> dict[str, str]:
        path = [str(ROOT)]
        if os.environ.get("PYTHONPATH"):
            path.append(os.environ["PYTHONPATH"])
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.size),
            "LOCAL_RANK": str(self.rank),
            FOLDER: str(self.folder),
            "PYTHONPATH": os.pathsep.join(path),
        }

    def _end_all(self, code: int, stderr_text: str):
        """Says once why the rank ended, and ends this process, and so the others."""
        _ending.acquire()  # and never released: one message is enough
        print_status(
            f"error: process {self.rank} of {self.size} (tensor parallel) {_reason(code, stderr_text)}; all were "
            "ended, run the same command again"
        )
        if self.terminal:  # the prompt's line editing changed it
            termios.tcsetattr(sys.stdin, termios.TCSANOW, self.terminal)
        shutil.rmtree(self.folder, ignore_errors=True)
        os._exit(code if CHECK_FAILED <= code <= MISSING_COMPONENT else CHECK_FAILED)


def _reason(code: int, stderr_text: str) -> str:
    """How a process ended, in its own words where it has left some; with --debug in all of them."""
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    if code == 0 or not stderr_text:
        return f"ended with code {code}"
    if "--debug" in sys.argv:
        return f"failed: {stderr_text}"
    return f"failed: {stderr_text.splitlines()[-1].removeprefix('error: ')}"


def _terminal_settings():
    with suppress(OSError, ValueError, AttributeError, termios.error):
        return termios.tcgetattr(sys.stdin)
