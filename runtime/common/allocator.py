"""glibc's malloc, told to give memory back: for processes that live long and decode pictures.

By default every thread gets arenas of its own, and a large block that was freed once raises the
size from which blocks are returned to the system, so that pictures of changing sizes, decoded in
several threads, leave holes that add up.
"""

import ctypes

# names of malloc.h
M_MMAP_THRESHOLD = -3
M_ARENA_MAX = -8
LARGE_BLOCK = 4 << 20  # bytes; from here on a block is the system's again when it is freed
ARENAS = 2


def return_large_blocks() -> bool:
    """Whether this C library could be told so. To be called before threads are started."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt"):
        return False
    fixed = library.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
    few = library.mallopt(M_ARENA_MAX, ARENAS)
    return bool(fixed and few)
