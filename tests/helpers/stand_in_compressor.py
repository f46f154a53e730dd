"""A stand-in for `compress_excutor`, the program that msmodelslim builds against CANN: its arguments and its files, as the
sources in msmodelslim's wheel read and write them. What it writes as the compressed weight is zlib's, not the NPU's."""

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
    if os.environ.get("STAND_IN_COMPRESSOR") == "broken":
        print("GE initialize failed.", file=sys.stderr)
        return 255
    if (
        os.environ.get("STAND_IN_COMPRESSOR") == "silent"
    ):  # the real one returns 0 when its graph fails
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
