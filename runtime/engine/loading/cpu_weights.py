"""--cpu-weights: takes a float checkpoint, returns its decoder's weights packed to int8 or int4.

They are packed one tensor at a time, and kept on disk: one file per weight, in a folder of the
cache named by a hash of the decoder's tensors and of how they are packed. The folder gets that name
when it is complete, so a killed run leaves nothing that looks usable.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from models.checkpoint.quantized import find_description
from runtime.common.errors import ToolkitError
from runtime.common.files import cache_root, locked, tensors_digest
from runtime.common.notes import note
from runtime.common.progress import byte_progress, step_progress
from runtime.ops.cpu.packed_weights import GROUP, Int4Weight, Int8Weight

from .weights import MATRICES, decoder_rows

PACKER = 1  # raise it when other numbers are stored: folders of older packers are made again
FORMS = {"int8": Int8Weight, "int4": Int4Weight}


def check_packable(family, kind: str):
    """ToolkitError for a checkpoint that is quantised already."""
    if kind != "float" and find_description(family.directory):
        raise ToolkitError(
            f"--cpu-weights {kind} packs float checkpoints, {family.directory} is quantised already; leave the "
            "flag out, or give the float checkpoint"
        )


def packed_weights(checkpoint, family, dtype: torch.dtype, kind: str, split) -> dict:
    """Canonical name -> tensor of `dtype`, or packed matrix; packs the checkpoint first if that was
    never done."""
    folder = packed_folder(checkpoint, family, kind, split)
    if not folder.is_dir():
        note(f"packing the decoder to {kind} once, into {folder}")
        try:
            _pack(checkpoint, family, kind, split, folder)
        except OSError as error:
            raise ToolkitError(
                f"the packed weights cannot be written to {folder} ({error.strerror}); make room there, or "
                "set ASCEND_VLM_CACHE to another folder"
            ) from error
    return _read(folder, dtype)


def packed_folder(checkpoint, family, kind: str, split) -> Path:
    rows = list(decoder_rows(family, split))
    table = [[w.source, [[str(p.target), p.take, p.at] for p in w.parts]] for w in rows]
    digest = tensors_digest(checkpoint, [w.source for w in rows if w.source in checkpoint.shapes])
    identity = json.dumps([PACKER, family.name, table, digest, split.size, split.rank])
    return cache_root() / "packed" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}-{kind}"


def _pack(checkpoint, family, kind, split, folder: Path):
    work = folder.with_name(f".{folder.name}")
    work.mkdir(parents=True, exist_ok=True)
    with locked(work), byte_progress(f"packing to {kind}") as progress:
        if folder.is_dir():  # another process was quicker
            return
        for name, tensor in checkpoint.assemble(decoder_rows(family, split), progress=progress):
            save_file(_stored(name, tensor, kind), work / f"{name}.safetensors")
        os.rename(work, folder)


def _stored(name: str, tensor, kind: str) -> dict[str, torch.Tensor]:
    """The head keeps 8 bits: it decides between tokens and is little of the whole."""
    if not name.endswith(MATRICES):
        return {"float": tensor}
    small = kind == "int4" and not name.startswith("lm_head") and Int4Weight.fits(tensor)
    return FORMS["int4" if small else "int8"].tensors(tensor)


def _read(folder: Path, dtype) -> dict:
    files = sorted(folder.glob("*.safetensors"))
    weights = {}
    with step_progress("loading packed weights", len(files)) as advance:
        for file in files:
            weights[file.stem] = _loaded(load_file(file), dtype)
            advance()
    return weights


def _loaded(stored: dict, dtype):
    if "float" in stored:
        return stored["float"].to(dtype)
    return next(form for name, form in FORMS.items() if name in stored).from_tensors(stored)


def bits_per_value(target: str, kind: str, dtype: torch.dtype) -> float:
    """What a target takes in memory. Matrices that int4 cannot hold, and stay int8, are counted as
    int4."""
    if kind == "float" or not target.endswith(MATRICES):
        return 8 * dtype.itemsize
    if kind == "int4" and not target.startswith("lm_head"):
        return 4 + 32 / GROUP
    return 8
