"""W8A8S -> W8A8SC: msmodelslim's Compressor, once for the share of every rank.

A W8A8S folder flows in; config.json, the small files and a folder partR-of-N for every rank flow out. Compressing is done by
a program that msmodelslim builds against CANN (`compress_excutor`); nothing here replaces it.
"""

import os
import shutil
from functools import partial
from pathlib import Path

import torch

from models import family_of
from models.checkpoint.quantized import FILE, Description, find_description
from models.checkpoint.reader import Checkpoint
from models.config import read_json
from runtime.common.errors import CHECK_FAILED, MISSING_COMPONENT, ToolkitError
from runtime.common.files import locked, write_atomically
from runtime.common.progress import byte_progress
from runtime.parallel.split import Split, check_split

from . import msmodelslim_calls as slim
from . import output as write
from .rank_shares import Shares, part_folders, part_name

KIND = "W8A8SC"
PROCESSES = 8
WORK = ".partial"


def compress(options) -> int:
    family, checkpoint, description = open_sparse(options.model)
    size = options.tensor_parallel_size
    check_split(family, size)
    slim.open_slim()
    find_compressor()
    out = prepare(options.out, options.model)
    with locked(out):
        folder = out / WORK
        shutil.rmtree(folder, ignore_errors=True)
        for rank in range(size):
            ratio = compress_rank(
                family, checkpoint, description, Split(family.decoder, size, rank), folder
            )
            print(
                f"{part_name(rank, size)}: compressed weights are {ratio:.1%} of their size",
                flush=True,
            )
        finish(checkpoint, folder, out, size)
    print(f"{out}: {KIND} for {size} ranks; MindIE loads it with as many")
    return 0


def open_sparse(model: str) -> tuple:
    """(family, checkpoint, description) of a W8A8S folder in float16; ToolkitError for another one."""
    description = find_description(model)
    kind = description.type if description else "float"
    if kind != "W8A8S":
        raise ToolkitError(
            f"--model {model} is {kind}, not W8A8S; make that with python -m quant --scheme w8a8s --dtype "
            "float16"
        )
    dtype = read_json(Path(model) / "config.json").get("torch_dtype")
    if dtype != "float16":
        raise ToolkitError(
            f"--model {model} is {dtype}, and the 310P computes float16 only; quantise again with --dtype "
            "float16"
        )
    return family_of(model), Checkpoint(model), description


def find_compressor() -> Path:
    """The program that msmodelslim's Compressor runs; ToolkitError with the command that builds it."""
    from msmodelslim.pytorch.weight_compression import compress_utils

    folder = Path(compress_utils.__file__).parent / "compress_graph"
    program = folder / "build" / "compress_excutor"
    if not os.access(program, os.X_OK):
        raise ToolkitError(
            f"msmodelslim's compressor {program} is not there: on the machine with the 310P and CANN run "
            f"`bash {folder / 'build.sh'} $ASCEND_HOME_PATH`, then this command again",
            MISSING_COMPONENT,
        )
    return program


def prepare(out: str, model: str) -> Path:
    """The output folder, empty but for what an earlier run left."""
    from .pipeline import prepare as made

    out = made(out, model)
    if find_description(out):
        raise ToolkitError(f"--out {out} holds quantised weights already; give an empty folder")
    return out


def compress_rank(
    family, checkpoint: Checkpoint, description: Description, split: Split, folder: Path
) -> float:
    """Write the folder of one rank, its description last -> bytes of the compressed weights as a share of the former."""
    shares = Shares(family, split)
    part = folder / part_name(split.rank, split.size)
    part.mkdir(parents=True)
    names = [
        name
        for name, kind in description.kinds.items()
        if kind == "W8A8S" and name.endswith(".weight")
    ]
    tensors = {name: shares.of(name).take(checkpoint.tensor(name)).contiguous() for name in names}
    before = sum(tensor.numel() for tensor in tensors.values())
    compressed = run_compressor(tensors)
    del tensors
    entries = [
        _entry(name, description.kinds[name], shares.of(name), checkpoint)
        for name in description.kinds
        if name not in compressed
    ]
    entries += [
        write.Entry(name, t.dtype, tuple(t.shape), KIND, partial(compressed.get, name))
        for name, t in compressed.items()
    ]
    with byte_progress(f"writing {part.name}") as update:
        write.write_weights(entries, part, KIND, update)
    write_atomically(part / FILE, write.write_description({e.name: e.kind for e in entries}, KIND))
    return sum(t.numel() for name, t in compressed.items() if name.endswith(".weight")) / before


def _entry(name: str, kind: str, share, checkpoint: Checkpoint) -> write.Entry:
    return write.Entry(
        name,
        checkpoint.dtype(name),
        share.shape(checkpoint.shapes[name]),
        kind,
        lambda: share.take(checkpoint.tensor(name)),
    )


def run_compressor(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{X.weight: int8 [n, k]} -> {X.weight: int8 [c], X.index: int8 [...], X.info: int64 [5]}, computed by msmodelslim."""
    from msmodelslim.pytorch.weight_compression import CompressConfig, Compressor

    description = {
        "model_quant_type": "W8A8S",
        "version": "1.0.0",
        **dict.fromkeys(weights, "W8A8S"),
    }
    with slim.private_directory() as work:
        config = CompressConfig(
            record_detail_root=str(work), multiprocess_num=min(PROCESSES, os.cpu_count())
        )
        try:
            found = Compressor(config, weight=weights, quant_model_description=description).run()
        except (
            Exception
        ) as error:  # it raises that class itself, whatever went wrong in its program
            said = " ".join(str(error.args[-1] if error.args else error).split())
            raise ToolkitError(
                f"msmodelslim's compressor failed ({said[:300]}); source CANN's set_env.sh and see its log in "
                "~/ascend/log",
                CHECK_FAILED,
            ) from error
    return {
        name.removesuffix("weight") + end: torch.from_numpy(array[name].astype(dtype))
        for name in weights
        for end, array, dtype in zip(("weight", "index", "info"), found, ("int8", "int8", "int64"))
    }


def finish(checkpoint: Checkpoint, folder: Path, out: Path, size: int):
    """Small files, validation, publication: config.json, without which nothing loads, comes last."""
    from .validate import validate

    small = write.copy_small_files(Path(checkpoint.directory), folder)
    (folder / FILE).unlink(missing_ok=True)
    write_atomically(
        folder / "config.json",
        write.write_config(
            read_json(Path(checkpoint.directory) / "config.json"), KIND, torch.float16
        ),
    )
    if problems := validate(folder).problems:
        raise ToolkitError(
            f"the result would not load: {problems[0]}; nothing was published", CHECK_FAILED
        )
    (out / "config.json").unlink(missing_ok=True)
    for old in part_folders(out).values():
        shutil.rmtree(old)
    for name in [
        *(part_name(rank, size) for rank in range(size)),
        *(n for n in small if n != FILE),
        "config.json",
    ]:
        os.replace(folder / name, out / name)
    shutil.rmtree(folder)
