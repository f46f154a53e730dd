"""Decode steps recorded as NPU or CUDA graphs: one per batch size, replayed with new inputs in the
same tensors.

Takes a host step and token ids, returns logits. A batch is filled up to the next recorded size with
padding rows that read and write a cache block of their own. Lengths that the attention kernels take
from the host are updated inside the graph by torch_npu (task update), layer by layer while the
graph runs; lengths in device memory are inputs like the others.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F

from models.network.decoder import Step
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.progress import track

BATCH_SIZES = (8, 4, 2, 1)  # the largest first: the others fit into its memory


@dataclass
class Recording:
    """One graph and the tensors it reads and writes: ids int64 [batch], step, logits float32
    [batch, vocab]."""

    graph: object
    ids: torch.Tensor
    step: Step
    logits: torch.Tensor


class DecodeGraphs:
    """Recorded decode steps of `decoder` over `cache`; `width` = blocks of the longest sequence."""

    def __init__(self, decoder, cache, width: int, device: str):
        self._decoder = decoder
        self._cache = cache
        self._width = width
        self._device = device
        self._torch = decoder.ops.accelerator  # torch.npu or torch.cuda: the same calls
        self._padding_block = int(cache.allocate(1)[0])
        self._recordings: dict[int, Recording] = {}

    @torch.inference_mode()
    def record(self):
        """Warm up and record every batch size, with a progress bar; ToolkitError when the driver
        refuses."""
        pool = self._torch.graph_pool_handle()
        for size in track("recording decode graphs", BATCH_SIZES):
            try:
                self._recordings[size] = self._record(size, pool)
            except RuntimeError as error:
                raise ToolkitError(
                    f"recording the decode step for {size} sequences failed ({error}); run again with "
                    "--enforce-eager",
                    CHECK_FAILED,
                ) from error

    def fits(self, batch: int) -> bool:
        return batch <= max(self._recordings)

    def run(self, ids: torch.Tensor, step: Step) -> torch.Tensor:
        """ids int64 [B] and the host step of B new tokens -> float32 logits [B, vocab]."""
        batch = len(ids)
        recording = self._recordings[min(size for size in self._recordings if size >= batch)]
        self._load(recording, ids, step)
        recording.graph.replay()
        if recording.step.kv_tensor is None:
            recording.graph.update(
                cpu_update_input=[{"actual_seq_lengths_kv": self._kv_lens(recording, step)}]
            )
        return recording.logits[:batch].clone()

    def _record(self, size, pool) -> Recording:
        ids = torch.zeros(size, dtype=torch.int64, device=self._device)
        step = self._begin(self._padded(self._empty_step(), size), self._device)
        self._compute(ids, step)  # warm-up: compiles kernels, makes masks
        self._torch.synchronize()
        graph, options = self._decoder.ops.new_graph(step)
        with self._torch.graph(graph, pool=pool, **options):
            logits = self._compute(ids, step)
        return Recording(graph, ids, step, logits)

    def _compute(self, ids, step):
        hidden = self._decoder.forward(self._decoder.embed(ids), step, self._cache)
        return self._decoder.logits(hidden)

    def _load(self, recording, ids, step):
        size = len(recording.ids)
        recording.ids.copy_(F.pad(ids, (0, size - len(ids))))
        fresh = self._decoder.ops.graph_inputs(self._begin(self._padded(step, size), "cpu"))
        for name, target in self._decoder.ops.graph_inputs(recording.step).items():
            target.copy_(fresh[name])

    def _empty_step(self) -> Step:
        config = self._decoder.config
        angles = torch.zeros(0, config.head_dim, dtype=self._decoder.embedding.dtype)
        slots = torch.zeros(0, dtype=torch.int64)
        tables = torch.zeros(0, self._width, dtype=torch.int32)
        return Step(angles, angles, slots, tables, q_lens=[], kv_lens=[])

    def _begin(self, step, device):
        return self._decoder.ops.begin(step, self._decoder.config, device)

    def _kv_lens(self, recording, step):
        return step.kv_lens + [1] * (len(recording.ids) - len(step.kv_lens))

    def _padded(self, step: Step, size: int) -> Step:
        """`step` with padding rows of one token each up to `size`, its block table of full width."""
        batch = len(step.slots)
        rows = size - batch
        columns = self._width - step.block_table.shape[1]
        tables = F.pad(step.block_table, (0, columns, 0, rows))
        tables[batch:] = self._padding_block
        slots = self._padding_block * self._cache.block_size + torch.arange(batch, size)
        return replace(
            step,
            cos=F.pad(step.cos, (0, 0, 0, rows)),
            sin=F.pad(step.sin, (0, 0, 0, rows)),
            slots=torch.cat((step.slots, slots)),
            block_table=tables,
            q_lens=[1] * size,
            kv_lens=step.kv_lens + [1] * rows,
        )
