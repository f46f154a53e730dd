"""--cpu-weights: takes a float checkpoint, returns its decoder's weights packed to int8 or int4.

They are packed one tensor at a time, and kept on disk: one file per weight, in a folder of the
cache named by a hash of the decoder's tensors and of how they are packed. The folder gets that name
when it is complete, so a killed run leaves nothing that looks usable.
"""

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import torch

from models.checkpoint.quantized import find_description
from models.checkpoint.table import Part, Weight
from models.checkpoint.tensor_files import save_tensors
from runtime.common.errors import ToolkitError
from runtime.common.files import cache_folder, locked, remove_folder, tensors_digest
from runtime.common.notes import note
from runtime.common.progress import byte_progress, step_progress
from runtime.ops.cpu.packed_weights import GROUP, Int4Weight, Int8Weight

from .packed_folder import DamagedPack, Layout, check_listed, read_weights, write_list
from .weights import MATRICES, check_finite, decoder_rows, sources_of

PACKER = 2  # raise it when other numbers are stored: folders of older packers are made again
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
    never done, or if what lies in the cache is damaged."""
    folder = packed_folder(checkpoint, family, kind, split)
    layouts = stored_layouts(checkpoint, decoder_rows(family, split), kind)
    try:
        return _read(folder, layouts, dtype)
    except DamagedPack as error:
        again = f"; what lies there cannot be used: {error}" if folder.exists() else ""
        note(f"packing the decoder to {kind} once, into {folder}{again}")
    try:
        _pack(checkpoint, family, kind, split, folder, layouts)
        return _read(folder, layouts, dtype)
    except (OSError, DamagedPack) as error:
        reason = getattr(error, "strerror", None) or error
        raise ToolkitError(
            f"the packed weights cannot be written to {folder} ({reason}); make room there, or set "
            "ASCEND_VLM_CACHE to another folder"
        ) from error


def packed_folder(checkpoint, family, kind: str, split) -> Path:
    rows = list(decoder_rows(family, split))
    table = [[w.source, [[str(p.target), p.take, p.at] for p in w.parts]] for w in rows]
    digest = tensors_digest(checkpoint, [w.source for w in rows if w.source in checkpoint.shapes])
    identity = json.dumps([PACKER, family.name, table, digest, split.size, split.rank])
    name = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return cache_folder("packed") / f"{name}-{kind}"


def stored_layouts(checkpoint, rows: list[Weight], kind: str) -> dict[str, Layout]:
    """Of every weight that the rows make: names, dtypes and shapes of its stored tensors."""
    layouts = {}
    for row in rows:
        if row.source not in checkpoint.shapes:
            continue
        for part in row.parts:
            name = str(part.target)
            layouts[name] = _layout(name, _target_shape(row.shape, part), kind)
    return layouts


def _target_shape(source: tuple[int, ...], part: Part) -> tuple[int, ...]:
    """Shape of the whole target that `part` of a tensor of shape `source` belongs to."""
    first, last = part.take or (0, source[0])
    piece = torch.empty(last - first, *source[1:], device="meta")
    if part.transform:  # may select columns, as the split of a matrix over devices does
        piece = part.transform(piece)
    rows = part.at[1] if part.at else piece.shape[0]
    return rows, *piece.shape[1:]


def _layout(name: str, shape: tuple[int, ...], kind: str) -> Layout:
    if not name.endswith(MATRICES):
        return {"float": (None, shape)}
    n, k = shape
    if _form(name, shape, kind) == "int8":
        return {"int8": (torch.int8, (n, k)), "scale": (torch.float32, (n,))}
    scales = (k // GROUP, n, 2)
    return {"int4": (torch.uint8, (n, k // 2)), "scales": (torch.bfloat16, scales)}


def _pack(checkpoint, family, kind, split, folder: Path, layouts: dict[str, Layout]):
    work = folder.with_name(f".{folder.name}")
    work.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(work), byte_progress(f"packing to {kind}") as progress:
        with suppress(DamagedPack):
            return check_listed(folder, layouts)  # another process was quicker
        rows = list(decoder_rows(family, split))
        sources = sources_of(rows)
        for name, tensor in checkpoint.assemble(rows, progress=progress):
            check_finite(sources[name], tensor)
            save_tensors(_stored(name, tensor, kind), work / f"{name}.safetensors")
        write_list(work)
        remove_folder(folder)
        os.rename(work, folder)


def _form(name: str, shape: tuple[int, ...], kind: str) -> str:
    """The head keeps 8 bits: it decides between tokens and is little of the whole."""
    small = kind == "int4" and not name.startswith("lm_head") and Int4Weight.fits(shape)
    return "int4" if small else "int8"


def _stored(name: str, tensor, kind: str) -> dict[str, torch.Tensor]:
    if not name.endswith(MATRICES):
        return {"float": tensor}
    return FORMS[_form(name, tensor.shape, kind)].tensors(tensor)


def _read(folder: Path, layouts: dict[str, Layout], dtype) -> dict:
    weights = {}
    with step_progress("loading packed weights", len(layouts)) as advance:
        for name, stored in read_weights(folder, layouts):
            weights[name] = _loaded(stored, dtype)
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
