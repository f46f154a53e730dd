"""The process in which a stranger's tokenizer is tried: `python -m models.prompt.tokenizer_process KIND PATH ARGUMENTS`.

Takes a class of tokenizers/, its file and its other arguments (JSON); loads it, and encodes and
decodes a little of everything. Its exit code matters only if a signal ended it.
"""

import json
import resource
import sys
from pathlib import Path

from . import tokenizer_limits
from .tokenizers.ice import IceTokenizer
from .tokenizers.json_file import JsonTokenizer
from .tokenizers.ranks import TiktokenTokenizer
from .tokenizers.sentencepiece_model import SentencePieceTokenizer

KINDS = {
    kind.__name__: kind
    for kind in (IceTokenizer, JsonTokenizer, SentencePieceTokenizer, TiktokenTokenizer)
}
SECONDS = 30  # of processor time
MEMORY = 4 << 30  # bytes of address space
TEXTS = ("Hello, world! 你好，世界。\n\t  12345 <0x41> é ﬁ 😀", "l" * 1000)
IDS = 200_000  # more than any vocabulary has
IDS_AT_ONCE = 100


def try_out(kind: str, path: Path, arguments: list):
    tokenizer = KINDS[kind](path, *arguments)
    for text in TEXTS:
        tokenizer.encode(text)
    for first in range(0, IDS, IDS_AT_ONCE):
        tokenizer.decode(range(first, first + IDS_AT_ONCE))


def main(kind: str, path: str, arguments: str):
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, 2 * SECONDS))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tokenizer_limits.is_trial = True
    try_out(kind, Path(path), json.loads(arguments))


if __name__ == "__main__":
    main(*sys.argv[1:])
