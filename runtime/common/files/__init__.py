"""Files that are whole or absent, private or refused.

`output` writes into folders that the user named, `cache` finds the toolkit's own, `checksums` finds
damage in both.
"""

from .cache import cache_folder, cache_root, open_private
from .checksums import (
    CHECKSUMS,
    check_again,
    check_checksums,
    checks_again,
    checksum_problems,
    file_entry,
    problem_of,
    tensors_digest,
    write_checksums,
)
from .output import (
    LOCK,
    appended_text,
    fresh_folder,
    locked,
    new_text,
    own_folder,
    prepare,
    remove_folder,
    work_folder,
    write_atomically,
)

__all__ = [
    "appended_text",
    "CHECKSUMS",
    "check_checksums",
    "checks_again",
    "checksum_problems",
    "work_folder",
    "write_checksums",
    "LOCK",
    "cache_folder",
    "cache_root",
    "check_again",
    "file_entry",
    "fresh_folder",
    "locked",
    "new_text",
    "open_private",
    "own_folder",
    "prepare",
    "problem_of",
    "remove_folder",
    "tensors_digest",
    "write_atomically",
]
