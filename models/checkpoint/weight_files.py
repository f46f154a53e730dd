"""Which files of a directory hold its weights: by an index, by the numbers in their names, or in the SAT layout.

Takes a directory, returns its format and files. Names in an index are plain names of files beside it, and there are no
more than MOST_FILES of them, whatever a name or an index says. Hidden files, such as macOS writes beside each file
(`._model.safetensors`), are no weights.
"""

import re
from contextlib import suppress
from pathlib import Path

from models.errors import ModelError
from models.files import is_plain_name
from models.other_kinds import refuse_other_files
from models.side_fields import shown
from models.side_files import is_there, read_json, read_text

from .shards import DamagedFile, stored_entries

MOST_FILES = 10_000  # the largest released models have a few hundred
AGAIN = "download index and weights again, together"


def find_files(directory: Path) -> tuple[str, list[Path], dict[str, str] | None]:
    """Format, weight files, and the index's {tensor: file name} where there is one."""
    formats = [
        _indexed(directory, "safetensors", "*.safetensors"),
        _indexed(directory, "bin", "pytorch_model*.bin"),
    ]
    for name, files, index in formats:
        if any(file.exists() for file in files):
            return name, files, index
    if is_there(directory / "latest") and not is_there(directory / "zero_to_fp32.py"):
        return "sat", _sat_files(directory), None
    for name, files, index in formats:
        if index is not None:
            return name, files, index
    refuse_other_files(directory)
    raise ModelError(
        f"{directory} holds no weights (*.safetensors, pytorch_model*.bin, or SAT's `latest`); "
        "download the model's weight files into it"
    )


def stored_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors in `directory`, from which a family reads their layout.

    {} if a file is missing or damaged.
    """
    shapes = {}
    with suppress(ModelError, DamagedFile):
        for file in find_files(directory)[1]:
            shapes.update((name, entry.shape) for name, entry in stored_entries(file).items())
        return shapes
    return {}


def _indexed(
    directory: Path, name: str, pattern: str
) -> tuple[str, list[Path], dict[str, str] | None]:
    indexes = _visible(directory, f"{pattern}.index.json")
    indexes.sort(key=lambda path: (not path.name.startswith("model."), path.name))
    if not indexes:
        return name, _with_gaps(_visible(directory, pattern)), None
    index = read_json(indexes[0])["weight_map"]
    files = sorted(set(index.values()))
    if len(files) > MOST_FILES:
        raise ModelError(
            f"{indexes[0]} names {len(files):,} files, and a checkpoint has up to {MOST_FILES:,}; {AGAIN}"
        )
    for file in files:
        if not is_plain_name(file):
            raise ModelError(
                f"{indexes[0]} names {shown(file)}, which is no file beside it; {AGAIN}"
            )
    return name, [directory / file for file in files], index


def _visible(directory: Path, pattern: str) -> list[Path]:
    """The directory's files of the pattern, in order, without hidden ones."""
    return sorted(file for file in directory.glob(pattern) if not file.name.startswith("."))


def _with_gaps(files: list[Path]) -> list[Path]:
    """Without an index, -0000k-of-0000n in the names still says which shards there should be."""
    complete = dict.fromkeys(files)
    for file in files:
        match = re.fullmatch(r"(.+-)(\d{1,12})-of-(\d+)(\.\w+)", file.name, re.ASCII)
        if not match:
            continue
        stem, number, count, suffix = match.groups()
        if int(count) > MOST_FILES or len(complete) > 2 * MOST_FILES:
            raise ModelError(
                f"{file} says in its name that it is one of {int(count):,} files, and a checkpoint has "
                f"up to {MOST_FILES:,}; download the weights again"
            )
        for k in range(1, int(count) + 1):
            name = f"{stem}{k:0{len(number)}}-of-{count}{suffix}"
            complete[file.with_name(name)] = None
    return sorted(complete)


def _sat_files(directory: Path) -> list[Path]:
    latest = directory / "latest"
    step = read_text(latest, largest=4096).strip()
    if not is_plain_name(step):
        raise ModelError(
            f"{latest} names {shown(step)}, which is no file beside it; download it again"
        )
    files = _visible(directory / step, "mp_rank_*_model_states.pt")
    if len(files) > 1:
        raise ModelError(
            f"{directory / step} is split over {len(files)} model-parallel ranks, only 1 can be read; "
            "merge it with SAT's own merge command first"
        )
    return files or [directory / step / "mp_rank_00_model_states.pt"]
