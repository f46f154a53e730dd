"""glibc's malloc, told what to keep and what to give back. Other C libraries do as they please.

A step of a decoder wants its freed memory again at once, a process that lives long must not keep
the holes that requests of all sizes leave in the heaps of its threads: it keeps freed memory, and
gives back what nobody has taken again when some seconds have passed.
"""

import ctypes
import threading
import time

# names of malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
ARENAS = 2
SECONDS = 10  # a service's memory is given back as often


def keep_freed_memory(largest: int, total: int):
    """From now on freed blocks of up to `largest` bytes are kept for the next ones, `total` bytes
    at most.

    Fresh pages from the system can cost more than what is done with them.
    """
    _set(M_MMAP_THRESHOLD, largest)
    _set(M_TRIM_THRESHOLD, total)


def return_freed_memory():
    """The holes that freed blocks left are the system's again."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def return_freed_memory_regularly(seconds: float = SECONDS):
    """From now on a thread does so as long as the process lives, and threads share ARENAS heaps
    rather than leave holes in one of their own each. To be called before others are started."""
    _set(M_ARENA_MAX, ARENAS)

    def work():
        while True:
            time.sleep(seconds)
            return_freed_memory()

    threading.Thread(target=work, name="allocator", daemon=True).start()


def _set(parameter: int, value: int):
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(parameter, value)
