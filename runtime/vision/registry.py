"""Which folder holds the converted encoder of a checkpoint: takes a Source's hash, returns the folder that
`python -m convert` wrote last. What lies there is checked by whoever opens it."""

import json
from pathlib import Path

from models.errors import ModelError
from runtime.common.files import cache_folder, open_private, write_atomically
from runtime.common.notes import note


def register(source_hash: str, folder: Path):
    """From now on this folder is found without --artifact; a note says so if that cannot be
    remembered."""
    record = _record(source_hash)
    try:
        write_atomically(record, json.dumps({"folder": str(folder.resolve())}) + "\n")
    except OSError as error:
        note(
            f"{record} cannot be written ({error.strerror}): give --artifact {folder} to the commands "
            "that run the model"
        )


def registered_folder(source_hash: str) -> Path | None:
    """None where nothing was registered, or the record cannot be read."""
    try:
        with open_private(_record(source_hash)) as stream:
            return Path(json.load(stream)["folder"])
    except (OSError, ValueError, TypeError, KeyError, ModelError):
        return None


def _record(source_hash: str) -> Path:
    return cache_folder("converted") / f"{source_hash[:32]}.json"
