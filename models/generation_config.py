"""generation_config.json. Takes a model folder, returns the checked fields that say how answers are
sampled and where they end.

Fields that are null count as absent, as in transformers. Anything that transformers could not use
either is a ModelError that names the file and the field.
"""

from pathlib import Path

from .side_fields import GENERATION
from .side_files import read_optional_json

FILE = "generation_config.json"
WHOLE = ("top_k", "max_length", "max_new_tokens")


def read_generation_config(directory: Path) -> dict:
    """The known fields that the folder's file gives, with eos_token_id as a tuple of ids. {} without
    the file.

    do_sample is always there when the file is: without it transformers does not sample.
    """
    given = read_optional_json(Path(directory) / FILE)
    if not given and not (Path(directory) / FILE).exists():
        return {}
    known = {field: given[field] for field in GENERATION if field in given}
    for field in WHOLE:
        if field in known:
            known[field] = int(known[field])
    if "eos_token_id" in known:
        known["eos_token_id"] = token_ids(known["eos_token_id"])
    return {"do_sample": False} | known


def token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    """The ids in a field that holds one id or a list of them; () for null."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
