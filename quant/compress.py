"""W8A8S -> W8A8SC with msmodelslim's Compressor, once for the share of every rank.

Takes a W8A8S folder; returns an exit code, with config.json, the small files and a folder
partR-of-N for every rank published. Compressing is done by a program that msmodelslim builds
against CANN (`compress_excutor`); nothing here replaces it.
"""

import os
import shlex
from functools import partial
from pathlib import Path

import torch

from models import family_of
from models.checkpoint import Checkpoint
from models.checkpoint.quantized import (
    FILE,
    Description,
    check_stored,
    find_description,
    stored_weights,
)
from models.side_files import read_as_stored, read_json
from quant.output.files import copy_small_files, small_files, write_config, write_description
from quant.output.weights import Entry, write_weights
from quant.validate.folder import validate
from runtime.common.errors import CHECK_FAILED, MISSING_COMPONENT, ToolkitError
from runtime.common.files import (
    check_checksums,
    fresh_folder,
    locked,
    remove_folder,
    write_atomically,
    write_checksums,
)
from runtime.common.progress import byte_progress
from runtime.parallel.split import Split, check_split

from .msmodelslim_calls import import_msmodelslim, private_directory
from .options import CompressOptions
from .pipeline import prepare_folder
from .rank_shares import Shares, part_folders, part_name
from .work_folder import PARTIAL

KIND = "W8A8SC"
PROCESSES = 8


def compress(options: CompressOptions) -> int:
    family, checkpoint, description = open_sparse(options.model)
    size = options.tensor_parallel_size
    check_split(family, size)
    check_vocabulary(family, size)
    import_msmodelslim()
    find_compressor()
    out = prepare_empty_folder(options.out, options.model)
    with locked(out):
        folder = fresh_folder(out / PARTIAL)
        for rank in range(size):
            split = Split(family.decoder, size, rank)
            ratio = compress_rank(family, checkpoint, description, split, folder)
            print(
                f"{part_name(rank, size)}: compressed weights are {ratio:.1%} of their size",
                flush=True,
            )
        finish(checkpoint, folder, out, size)
    print(f"{out}: {KIND} for {size} ranks; MindIE loads it with as many")
    return 0


def check_vocabulary(family, size: int):
    """ToolkitError when the ranks cannot share the vocabulary evenly, as MindIE's do."""
    count = family.decoder.vocab_size
    if count % size:
        raise ToolkitError(
            f"--tensor-parallel-size {size} does not divide the {count} rows of the output layer, and MindIE's ranks "
            "hold equal shares of it; use a size that does, e.g. 1"
        )


def open_sparse(model: str) -> tuple:
    """(family, checkpoint, description) of a W8A8S folder in float16; ToolkitError for another
    one, ModelError if its tensors are not those of its config.json and description."""
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
    small_files(Path(model))
    check_checksums(Path(model))
    family = family_of(model)
    checkpoint = Checkpoint(model)
    check_stored(description, checkpoint)
    checkpoint.check(stored_weights(family))
    return family, checkpoint, description


def find_compressor() -> Path:
    """The program that msmodelslim's Compressor runs; ToolkitError with the command that builds
    it."""
    from msmodelslim.pytorch.weight_compression import compress_utils

    folder = Path(compress_utils.__file__).parent / "compress_graph"
    program = folder / "build" / "compress_excutor"
    if not os.access(program, os.X_OK):
        raise ToolkitError(
            f"msmodelslim's compressor {program} is not there: on the machine with the 310P and CANN run "
            f"`bash {shlex.quote(str(folder / 'build.sh'))} $ASCEND_HOME_PATH`, then this command again",
            MISSING_COMPONENT,
        )
    return program


def prepare_empty_folder(out: str, model: str) -> Path:
    """The output folder, empty but for what an earlier run left; ToolkitError if other weights are
    in it."""
    folder = prepare_folder(out, model)
    if (folder / FILE).exists():
        raise ToolkitError(f"--out {folder} holds quantised weights already; give an empty folder")
    return folder


def compress_rank(
    family, checkpoint: Checkpoint, description: Description, split: Split, folder: Path
) -> float:
    """Write the folder of one rank, its description last -> size of the compressed weights relative
    to before."""
    shares = Shares(family, split)
    part = folder / part_name(split.rank, split.size)
    part.mkdir()
    weights = sparse_weights(description, checkpoint, shares)
    bytes_before = total_elements(weights)
    compressed = run_compressor(weights)
    del weights
    entries = rank_entries(description, checkpoint, shares, compressed)
    with byte_progress(f"writing {part.name}") as update:
        names = write_weights(entries, part, KIND, update)
    kinds = {entry.name: entry.kind for entry in entries}
    write_atomically(part / FILE, write_description(kinds, KIND))
    write_checksums(part, [*names, FILE])
    return total_elements(compressed) / bytes_before


def sparse_weights(
    description: Description, checkpoint: Checkpoint, shares: Shares
) -> dict[str, torch.Tensor]:
    """{stored name: the rank's share} of the weights to compress, int8 [n, k]."""
    weights = {}
    for name in description.kinds:
        is_sparse = description.kind(name.removesuffix(".weight")) == "W8A8S"
        if is_sparse and name.endswith(".weight"):
            weights[name] = shares.of(name).take(checkpoint.tensor(name)).contiguous()
    return weights


def rank_entries(
    description: Description,
    checkpoint: Checkpoint,
    shares: Shares,
    compressed: dict[str, torch.Tensor],
) -> list[Entry]:
    """What to write for the rank: its shares of the tensors that are not compressed, and the
    compressed ones, under MindIE's names."""
    entries = []
    for name, kind in description.kinds.items():
        if name not in compressed and shares.is_needed(name):
            entries.append(share_entry(name, kind, shares, checkpoint))
    for name, tensor in compressed.items():
        read = partial(compressed.get, name)
        entries.append(Entry(shares.name(name), tensor.dtype, tuple(tensor.shape), KIND, read))
    return entries


def total_elements(tensors: dict[str, torch.Tensor]) -> int:
    """Of the weights, which are int8: also their size in bytes."""
    return sum(tensor.numel() for name, tensor in tensors.items() if name.endswith(".weight"))


def share_entry(name: str, kind: str, shares: Shares, checkpoint: Checkpoint) -> Entry:
    """A rank's share of a tensor that is not compressed."""
    share = shares.of(name)
    shape = share.shape(checkpoint.shapes[name])
    dtype = checkpoint.dtype(name)
    return Entry(shares.name(name), dtype, shape, kind, lambda: share.take(checkpoint.tensor(name)))


def run_compressor(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{X.weight: int8 [n, k]} -> {X.weight: int8 [c], X.index: int8 [...], X.info: int64 [5]},
    computed by msmodelslim."""
    from msmodelslim.pytorch.weight_compression import CompressConfig, Compressor

    description = {"model_quant_type": "W8A8S", "version": "1.0.0"} | dict.fromkeys(
        weights, "W8A8S"
    )
    processes = min(PROCESSES, os.cpu_count())
    with private_directory() as folder:
        config = CompressConfig(record_detail_root=str(folder), multiprocess_num=processes)
        try:
            compressor = Compressor(config, weight=weights, quant_model_description=description)
            arrays, indices, infos = compressor.run()
        except Exception as error:  # the very class that it raises, whatever went wrong
            raise compressor_error(error) from error
    return compressed_tensors(arrays, indices, infos)


def compressed_tensors(arrays: dict, indices: dict, infos: dict) -> dict[str, torch.Tensor]:
    """Each: {X.weight: array}."""
    tensors = {}
    for name in arrays:
        layer = name.removesuffix("weight")
        tensors[name] = torch.from_numpy(arrays[name].astype("int8"))
        tensors[layer + "index"] = torch.from_numpy(indices[name].astype("int8"))
        tensors[layer + "info"] = torch.from_numpy(infos[name].astype("int64"))
    return tensors


def compressor_error(error: Exception) -> ToolkitError:
    reason = error.args[-1] if error.args else error
    on_one_line = " ".join(str(reason).split())
    return ToolkitError(
        f"msmodelslim's compressor failed ({on_one_line[:300]}); source CANN's set_env.sh and see its log "
        "in ~/ascend/log",
        CHECK_FAILED,
    )


def finish(checkpoint: Checkpoint, folder: Path, out: Path, size: int):
    """Add the small files, validate, and publish: config.json, without which nothing loads, comes
    last."""
    source = Path(checkpoint.directory)
    small = copy_small_files(source, folder)
    (folder / FILE).unlink(missing_ok=True)
    config = write_config(read_as_stored(source / "config.json"), KIND, torch.float16)
    write_atomically(folder / "config.json", config)
    if problems := validate(folder).problems:
        raise ToolkitError(
            f"the result would not load: {problems[0]}; nothing was published", CHECK_FAILED
        )
    names = [name for name in small if name != FILE]
    parts = [part_name(rank, size) for rank in range(size)]
    publish_parts(folder, out, [*parts, *names, "config.json"])


def publish_parts(folder: Path, out: Path, names: list[str]):
    """Replace the parts in `out` by what is called `names` in `folder`, in this order."""
    (out / "config.json").unlink(missing_ok=True)
    for old in part_folders(out).values():
        remove_folder(old)
    for name in names:
        os.replace(folder / name, out / name)
    remove_folder(folder)
