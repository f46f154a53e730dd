"""Memory of a long-lived process: blocks that were freed are the system's again."""

import subprocess
import sys

import paths

CODE = """
import re
from runtime.common.allocator import return_large_blocks

def resident():
    with open("/proc/self/status") as status:
        return int(re.search(r"VmRSS:\\s+(\\d+)", status.read())[1]) >> 10

told = return_large_blocks()
before = resident()
for _ in range(3):
    large = [bytearray(b"x") * (6 << 20) for _ in range(20)]
    small = [bytes(1000) for _ in range(10)]  # behind the large ones: the heap cannot shrink
    del large
print(told, resident() - before)
"""


def test_large_blocks_are_given_back():
    done = subprocess.run(
        [sys.executable, "-c", CODE], cwd=paths.ROOT, capture_output=True, text=True, check=True
    )
    told, growth = done.stdout.split()
    assert told == "True" and int(growth) < 20
