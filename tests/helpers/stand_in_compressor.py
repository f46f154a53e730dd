"""A stand-in for `compress_excutor`, the program that msmodelslim builds against CANN.

It takes the arguments and writes the files that the sources in msmodelslim's wheel pass and read. The compressed weight is
zlib's, not the NPU's.
"""

import os
import struct
import sys
import zlib
from pathlib import Path


def main(arguments: list[str]) -> int:
    if len(arguments) != 11:
        print("Please check your input params count is 11.")
        return 255
    dim_k, dim_n, tight, *_ = map(int, arguments[:7])
    source, compressed, index, info = map(Path, arguments[7:])
    behaviour = os.environ.get("STAND_IN_COMPRESSOR")
    if behaviour == "broken":
        print("GE initialize failed.", file=sys.stderr)
        return 255
    if behaviour == "silent":  # the real one returns 0 when its graph fails
        return 0
    data = source.read_bytes()
    if len(data) != dim_k * dim_n * 16 * 32:
        print(f"Invalid param: expected len={dim_k * dim_n * 512}, but file size={len(data)}")
        return 255
    packed = zlib.compress(data)
    compressed.write_bytes(packed)
    index.write_bytes(bytes((8 if tight else 2) * -(-dim_k // 8) * -(-dim_n // 8)))
    info.write_bytes(struct.pack("<3I", 8, 8, len(packed)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
