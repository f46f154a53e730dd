"""The one thread in which aclruntime is called: takes functions, returns what they return.

aclruntime binds an ACL context to the calling thread and prints on stdout. In a thread of its own
torch_npu cannot change that context, nor aclruntime torch_npu's; what the library prints is caught
and shown only as the reason of a failure.
"""

import ctypes
import os
import re
import sys
import tempfile
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from threading import Thread


class AclThread:
    """Runs calls one at a time in a thread of its own, with the process's stdout caught.

    A daemon, unlike an executor's thread: it must still run when the exit handlers release what it
    opened.
    """

    def __init__(self):
        self._jobs = SimpleQueue()
        self._printed = ""
        self._stopped = False
        Thread(target=self._work, name="aclruntime", daemon=True).start()

    def call(self, function, *arguments):
        if self._stopped:
            raise RuntimeError("it was closed")
        future = Future()
        self._jobs.put((future, function, arguments))
        try:
            return future.result()
        except KeyboardInterrupt:
            wait([future])  # stdout comes back with the end of the call
            raise

    def reason(self, error: Exception) -> str:
        """The exception's own text and the last error the library printed during the last call;
        without either the exception's class."""
        printed = re.findall(r"\[error\][ \t]*(.+)", self._printed, re.IGNORECASE)
        texts = [text for text in (str(error).strip(), *printed[-1:]) if text]
        return "; ".join(texts) or type(error).__name__

    def stop(self):
        self._stopped = True
        self._jobs.put(None)

    def _work(self):
        while job := self._jobs.get():
            self._do(*job)
            del job  # or it would keep a released session alive

    def _do(self, future, function, arguments):
        printed = Printed()
        try:
            with captured_stdout(printed):
                result = function(*arguments)
            future.set_result(result)
        except BaseException as error:
            self._printed = printed.text
            future.set_exception(error)


class Printed:
    """What was printed while stdout was caught."""

    text = ""


@contextmanager
def captured_stdout(printed: Printed):
    """File descriptor 1 goes to a file for a while, C's buffers included; at the end `printed.text`
    is what came."""
    _occupy(1)
    stdout = os.dup(1)
    libc = ctypes.CDLL(None)
    _flush(libc)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            _flush(libc)
            os.dup2(stdout, 1)
            os.close(stdout)
            file.seek(0)
            printed.text = file.read().decode(errors="replace")


def _occupy(descriptor: int):
    """A closed descriptor becomes the null device for good, or the next file opened would be given
    its number."""
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)


def _flush(libc):
    # a reader that is gone, a closed or missing stdout
    with suppress(OSError, ValueError, AttributeError):
        sys.stdout.flush()
    libc.fflush(None)
