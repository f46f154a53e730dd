"""A part of a command as a process of its own, which gives all its memory back when it ends."""
import ctypes
import signal
import subprocess

from runtime.vision.artifact import start_module

PR_SET_PDEATHSIG = 1        # Linux, prctl.h


def output_of(module: str, *arguments) -> tuple[int, bytes]:
    """(exit status, stdout) of `python -m module arguments`, which should call `die_with_parent`; Ctrl-C ends it too."""
    with start_module(module, *arguments, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            process.kill()
            raise
    return process.returncode, output


def die_with_parent():
    """From now on nothing of this process goes on when the one that started it is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
