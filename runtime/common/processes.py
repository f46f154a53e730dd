"""A part of a command as a process of its own, which gives all its memory back when it ends."""

import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

from .files import cache_root

PR_SET_PDEATHSIG = 1  # Linux, prctl.h
ROOT = Path(__file__).resolve().parents[2]  # where our own packages lie
RUN_MODULE = """
import sys
sys.path[:] = filter(None, sys.path)  # with -c, an empty place stands for the current folder
import runpy
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def output_of(module: str, *arguments) -> tuple[int, bytes]:
    """(exit status, stdout) of `python -m module arguments`, which should call `die_with_parent`;
    Ctrl-C ends it too."""
    with start_module(
        module, *arguments, stdout=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            process.kill()
            raise
    return process.returncode, output


def die_with_parent():
    """From now on the kernel kills this process as soon as the one that started it has died."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def module_command(module: str, *arguments) -> list[str]:
    """The command line of `python -m module arguments`, which on every Python, as with -P from 3.11
    on, imports nothing from the folder that it is started in."""
    return [sys.executable, "-c", RUN_MODULE, module, *map(str, arguments)]


def start_module(module: str, *arguments, **options) -> subprocess.Popen:
    """`python -m module arguments` of ours, found however this process was started; paths must be
    absolute."""
    environment = {**os.environ, "ASCEND_VLM_CACHE": str(cache_root().absolute())}
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)], cwd=ROOT, env=environment, **options
    )
