"""Builds what an Engine works with: takes a model folder and options, returns EngineParts.

The order of the stages is part of the behaviour: what can be refused is refused before it costs
anything. First comes what config.json says, then the device, the memory plan, the names in the
checkpoint, and only then are weights read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from models import family_of
from models.checkpoint import Checkpoint
from models.checkpoint.quantized import check_stored, find_description, stored_weights
from models.family import Family
from models.network.decoder import Decoder
from runtime.common import threads
from runtime.common.files import check_checksums
from runtime.common.notes import note
from runtime.engine.device_graphs import DecodeGraphs
from runtime.engine.kv_cache import KVCache
from runtime.engine.options import EngineOptions
from runtime.engine.runner import Runner
from runtime.ops import choose
from runtime.parallel.split import Split, check_split
from runtime.parallel.team import Team, close_team, open_team, rank_and_size
from runtime.vision.om_file import check_om

from .cpu_weights import check_packable, packed_weights
from .layer_by_layer import CurrentLayerWeights
from .memory import Plan, decoder_bytes, max_model_len_for, plan_engine
from .weights import decoder_weights


@dataclass
class EngineParts:
    """What is decided before weights are read; `runner` (decoder and cache) comes last."""

    options: EngineOptions
    family: Family
    max_model_len: int
    ops: object
    block_size: int
    plan: Plan
    checkpoint: Checkpoint
    team: Team | None
    split: Split
    current_layer: CurrentLayerWeights | None = None
    runner: Runner | None = None


def build(model_dir, options: EngineOptions, load: Callable) -> EngineParts:
    """All parts of an engine, ready to run. load(model_dir, options) loads the model on the other
    ranks of a split one.

    Raises ToolkitError or ModelError, each one sentence, before memory is touched where that is
    possible.
    """
    # 1. Family: what config.json rules out
    family = family_of(model_dir)
    check_split(family, options.tensor_parallel_size)
    check_packable(family, options.cpu_weights)
    max_model_len = max_model_len_for(family, options.max_model_len)
    # 2. Device: its operators, and what they cannot compute
    ops, block_size, dtype = open_device(family, options)
    options = replace(options, block_size=block_size)
    # 3. Memory: the plan, noted before loading begins
    plan = plan_engine(family, dtype, max_model_len, options, free_memory(ops, options))
    note(plan.describe())
    # 4. Checkpoint: the names and shapes of its tensors
    checkpoint = open_checkpoint(family)
    # 5. Vision: an .om that is asked for must be there
    if options.vision == "om" and family.vision:
        check_om(family, checkpoint, options.artifact)
    # 6. Processes: the other ranks of a split model begin to load
    team = open_team(model_dir, replace(options, cache_tokens=plan.cache_tokens), load)
    ops.team = team
    choose_threads(family, plan, options)
    rank = team.rank if team else 0
    split = Split(family.decoder, options.tensor_parallel_size, rank)
    if rank == 0:
        family.prepare_prompts()
    # 7. Decoder: weights, cache, recorded graphs
    parts = EngineParts(
        options, family, max_model_len, ops, block_size, plan, checkpoint, team, split
    )
    load_decoder(parts)
    return parts


def choose_threads(family: Family, plan: Plan, options: EngineOptions):
    """On the CPU: as many threads as this process may use, and one for a small decoder."""
    if options.device != "cpu":
        return
    processes = options.tensor_parallel_size
    split = Split(family.decoder, processes)
    weights = decoder_bytes(family, plan.dtype, split, options.cpu_weights)
    torch.set_num_threads(threads.for_decoder(weights, processes))


def open_device(family: Family, options: EngineOptions) -> tuple[object, int, str]:
    """(operators, tokens per cache block, name of the dtype or "auto")."""
    ops = choose(options.ops, options.device, options.kernels)
    wanted = options.block_size or ops.default_block_size
    block_size = ops.nearest_block_size(wanted)
    if block_size != wanted:
        note(
            f"--block-size {wanted}: {ops.name} attention does not page by it, {block_size} is used"
        )
    note_about_kernels(options, ops)
    dtype = ops.default_dtype(family) if options.dtype == "auto" else options.dtype
    ops.check(dtype)
    return ops, block_size, dtype


def note_about_kernels(options: EngineOptions, ops):
    """Says what has no effect here, and why no graphs are recorded."""
    device = options.device
    if options.kernels != "auto" and ops.name != "npu":
        note(f"--kernels {options.kernels} has no effect: {ops.name} operators run on {device}")
    if options.enforce_eager and not ops.records_graphs:
        note(f"--enforce-eager has no effect on {device}: no graphs are recorded there")
    elif ops.name == "npu" and not ops.records_graphs:
        note(
            "no decode graphs are recorded, every step runs kernel by kernel: these kernels read "
            "lengths from the host or are aclop's (docs/npu.md)"
        )


def free_memory(ops, options: EngineOptions) -> int | None:
    """Bytes that this process may plan with; None on ranks whose plan rank 0 has checked."""
    free = ops.free_memory()
    if options.device != "cpu":
        return free
    rank, _ = rank_and_size()
    if rank > 0:
        return None
    return free // options.tensor_parallel_size  # the ranks share the host's memory


def open_checkpoint(family: Family) -> Checkpoint:
    checkpoint = Checkpoint(family.directory)
    checkpoint.check(stored_weights(family))
    if description := find_description(family.directory):
        check_checksums(family.directory)
        check_stored(description, checkpoint)
    return checkpoint


def load_decoder(parts: EngineParts):
    """Sets `runner`, and `current_layer` where it is used; ends the other ranks when that fails."""
    team = parts.team
    try:
        if team:
            team.connect(parts.options.device)
        weights = read_weights(parts)
        decoder = Decoder(parts.split.config, weights, parts.ops)
        parts.runner = make_runner(parts, decoder)
        if team:
            team.wait_for_all()
    except BaseException:
        parts.runner = None
        if team:
            close_team()
        raise


def read_weights(parts: EngineParts) -> dict:
    """The decoder's weights by canonical name, in the form that the options ask for."""
    options = parts.options
    source = (parts.checkpoint, parts.family, parts.plan.dtype)
    if options.layer_by_layer:
        parts.current_layer = CurrentLayerWeights(*source, parts.ops, parts.split)
        return parts.current_layer.weights()
    if options.cpu_weights != "float":
        return packed_weights(*source, options.cpu_weights, parts.split)
    return decoder_weights(*source, options.device, parts.ops, parts.split, options.keep_dtype)


def make_runner(parts: EngineParts, decoder: Decoder) -> Runner:
    """Cache and recorded decode steps around a decoder."""
    ops = parts.ops
    device = parts.options.device
    with_graphs = ops.records_graphs and not parts.options.enforce_eager
    longest = -(-parts.max_model_len // parts.block_size)  # blocks of the longest sequence
    blocks = max(parts.plan.cache_tokens // parts.block_size, longest)
    if with_graphs:
        blocks += 1  # for the rows that fill a batch up
    cache = KVCache(decoder.config, blocks, parts.block_size, parts.plan.dtype, device, ops)
    ops.loaded()
    graphs = None
    if with_graphs:
        graphs = DecodeGraphs(decoder, cache, longest, device)
        graphs.record()
    return Runner(decoder, cache, graphs, parts.team)
