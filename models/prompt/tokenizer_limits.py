"""What a tokenizer file may ask of the libraries in Rust and C++ that read it, which would abort the process.

Takes a tokenizer.json, or the table of rewritings of a sentencepiece file; ModelError for one that would make a text
grow without end.
"""

import functools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from models.errors import ModelError
from models.side_fields import LONGEST_ADDED, MOST_ADDED, is_added_token

ROOT = Path(__file__).resolve().parents[2]
PROCESS = "models.prompt.tokenizer_process"
is_trial = False  # whether this process is there to be ended
LARGEST = 128 << 20  # bytes of a tokenizer file; released ones have up to 35 MB
LARGEST_GROWTH = 1000  # times a text may grow before it is cut into tokens
# characters that each step makes of one, at most
GROWTHS = {
    **dict.fromkeys(("NFC", "Strip", "StripAccents", "Nmt", "Metaspace"), 1),
    **dict.fromkeys(("Lowercase", "BertNormalizer", "NFD", "ByteLevel"), 4),
    **dict.fromkeys(("NFKC", "NFKD", "Precompiled"), 18),
}


@contextmanager
def library_errors(path: Path, doing: str = "") -> Iterator[None]:
    """Whatever a library in C++ or Rust raises becomes a ModelError: a panic of Rust is no
    Exception. doing: what the library of a file that was loaded is asked to do."""
    try:
        yield
    except (ModelError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        reason = f"({str(error)[:200]})"
        if doing:
            raise ModelError(
                f"the library of {path} cannot {doing} {reason}; shorten the text, or download the file again"
            ) from None
        raise ModelError(
            f"{path} is not a tokenizer file, or cannot be used by its library {reason}; download it again"
        ) from None


def try_first(kind: str, path: Path, *arguments):
    """ModelError when the process that loads and uses the tokenizer does not survive it: an abort of
    a library leaves nothing to catch. What it raises is left to the caller, who meets it again.

    kind: class of tokenizers/; arguments: those behind its path, as JSON has them.
    """
    if is_trial or not path.is_file():
        return
    state = path.stat()
    end = _end_of_trial(
        kind, path, json.dumps(arguments), state.st_ino, state.st_size, state.st_mtime_ns
    )
    if end < 0:
        how = "takes its library too long" if -end == signal.SIGXCPU else "ends its library"
        raise ModelError(f"{path} {how} ({signal.Signals(-end).name}); download it again")


@functools.lru_cache(maxsize=64)
def _end_of_trial(kind: str, path: Path, arguments: str, *state: int) -> int:
    """Exit code of the process; negative: the signal that ended it. state: of the file."""
    command = [sys.executable, "-m", PROCESS, kind, path.resolve(), arguments]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, **silent).returncode


def check_tokenizer(content: dict, path: Path):
    """ModelError if the steps of a tokenizer.json make a text grow beyond all measure, or its added
    tokens are none."""
    added = content.get("added_tokens") or []
    if (
        not isinstance(added, list)
        or len(added) > MOST_ADDED
        or not all(map(is_added_token, added))
    ):
        raise ModelError(
            f"{path} must list up to {MOST_ADDED:,} added_tokens, each with a content of 1 to "
            f"{LONGEST_ADDED:,} characters; download it again"
        )
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
    if kind == "Prepend":
        return 1 + len(str(step.get("prepend")))
    if kind != "Replace":
        return GROWTHS.get(kind, 1) if isinstance(kind, str) else 1
    content = step.get("content")
    pattern = step.get("pattern")
    found = next(iter(pattern.values()), "") if isinstance(pattern, dict) else ""
    length = len(content) if isinstance(content, str) else 0
    if isinstance(pattern, dict) and "String" in pattern and isinstance(found, str) and found:
        return max(1, length // len(found))
    return max(1, length) if found else LARGEST_GROWTH + 1  # nothing matches everywhere
