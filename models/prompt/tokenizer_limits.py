"""What a tokenizer file may ask of the libraries in Rust and C++ that read it, which would abort the process.

Takes a tokenizer.json, or the table of rewritings of a sentencepiece file; ModelError for one that would make a text
grow without end.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import ModelError

LARGEST = 128 << 20  # bytes of a tokenizer file; released ones have up to 35 MB
LARGEST_GROWTH = 1000  # times a text may grow before it is cut into tokens
# characters that each step makes of one, at most
GROWTHS = {
    **dict.fromkeys(("NFC", "Strip", "StripAccents", "Nmt", "Prepend", "Metaspace"), 1),
    **dict.fromkeys(("Lowercase", "BertNormalizer", "NFD", "ByteLevel"), 4),
    **dict.fromkeys(("NFKC", "NFKD", "Precompiled"), 18),
}


@contextmanager
def library_errors(path: Path) -> Iterator[None]:
    """Whatever a library in Rust raises becomes a ModelError: a panic there is no Exception."""
    try:
        yield
    except (ModelError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise ModelError(
            f"{path} is not a tokenizer file, or cannot be used by its library ({str(error)[:200]}); download it again"
        ) from None


def check_tokenizer(content: dict, path: Path):
    """ModelError if the steps of a tokenizer.json make a text grow beyond all measure."""
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        growth = 1
        for step in _steps(content.get(name)):
            growth *= _growth(step)
            if growth > LARGEST_GROWTH:
                raise ModelError(
                    f"{path} has a {name} that makes a text more than {LARGEST_GROWTH} times as long; "
                    "download it again"
                )


def _steps(step) -> Iterator[dict]:
    """The steps of a sequence of sequences, in any order."""
    waiting = [step]
    while waiting:
        step = waiting.pop()
        if not isinstance(step, dict):
            continue
        yield step
        for name in ("normalizers", "pretokenizers", "decoders"):
            inner = step.get(name)
            if isinstance(inner, list):
                waiting += inner


def _growth(step: dict) -> int:
    """Characters that one character of a text becomes, at most."""
    kind = step.get("type")
    if kind != "Replace":
        return GROWTHS.get(kind, 1) if isinstance(kind, str) else 1
    content = step.get("content")
    pattern = step.get("pattern")
    found = next(iter(pattern.values()), "") if isinstance(pattern, dict) else ""
    length = len(content) if isinstance(content, str) else 0
    if isinstance(pattern, dict) and "String" in pattern and isinstance(found, str) and found:
        return max(1, length // len(found))
    return max(1, length) if found else LARGEST_GROWTH + 1  # nothing matches everywhere
