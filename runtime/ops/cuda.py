"""The operator set on NVIDIA GPUs: torch's fused norms and scaled-dot-product attention.

Takes and returns what ReferenceOps does, on the GPU. A decode step (one new token per sequence)
takes its lengths from device memory and gathers whole block tables, so that it can be recorded as
a CUDA graph; prompts run sequence by sequence. The vision encoder stays on the host.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from models.network.decoder import Step
from runtime.common.errors import MISSING_COMPONENT, ToolkitError

from .fused import AcceleratorOps
from .reference import add_norm_bias


@dataclass
class CudaStep(Step):
    """kv_tensor int64 [B] on the device: lengths, where every sequence has one new token."""

    kv_tensor: torch.Tensor | None = None


class CudaOps(AcceleratorOps):
    name = "cuda"

    def check(self, dtype: str):
        """ToolkitError for bfloat16 on a GPU that only emulates it."""
        if dtype == "bfloat16" and dtype not in self.dtypes:
            raise ToolkitError(
                f"{torch.cuda.get_device_name(self.device)} does not support --dtype bfloat16; "
                "use --dtype float16"
            )

    @property
    def dtypes(self):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return ("float16", "bfloat16")
        return ("float16",)

    @property
    def accelerator(self):
        return torch.cuda

    def new_graph(self, step):
        """(graph, keyword arguments of `torch.cuda.graph`)"""
        return torch.cuda.CUDAGraph(), {}

    def begin(self, step, config, device):
        step = super().begin(step, config, device)
        lengths = None
        if step.causal and max(step.q_lens) == 1:
            lengths = torch.tensor(step.kv_lens, device=device)
        return CudaStep(**vars(step), kv_tensor=lengths)

    def rms_norm(self, x, norm, eps):
        return add_norm_bias(F.rms_norm(x, x.shape[-1:], norm.weight, eps), norm)

    def attention(self, q, k, v, keys, values, step):
        if step.kv_tensor is not None:
            cached_k = _blocks(keys, step.block_table)
            cached_v = _blocks(values, step.block_table)
            return _decode_attention(q, cached_k, cached_v, step.kv_tensor)
        outputs = []
        for rows, table, length in zip(q.split(step.q_lens), step.block_table, step.kv_lens):
            cached_k = _blocks(keys, table[None])[0, :length]
            cached_v = _blocks(values, table[None])[0, :length]
            outputs.append(_prefill_attention(rows, cached_k, cached_v, step.causal))
        return torch.cat(outputs)


def _blocks(cache, tables):
    """Cache [blocks, block_size, kv_heads, head_dim], tables [B, n] -> [B, n * block_size,
    kv_heads, head_dim]."""
    rows = cache.index_select(0, tables.flatten())
    return rows.view(len(tables), -1, *cache.shape[2:])


def _decode_attention(q, k, v, lengths):
    """q [B, heads, head_dim] against the first `lengths` of k, v [B, n, kv_heads, head_dim], which
    are copies: the others become 0.

    The queries that share a key head are rows of one matmul.
    """
    seen = torch.arange(k.shape[1], device=q.device) < lengths[:, None]
    mask = seen[:, None, None]
    # another sequence may have left NaN there, and NaN times a weight of 0 is NaN
    hidden = ~seen[:, :, None, None]
    k = k.masked_fill_(hidden, 0).transpose(1, 2)
    v = v.masked_fill_(hidden, 0).transpose(1, 2)
    grouped = q.view(len(q), k.shape[1], -1, q.shape[2])
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(q.shape)


def _prefill_attention(q, k, v, causal):
    """q [rows, heads, head_dim] against k, v [length, kv_heads, head_dim], of which the last `rows`
    are its own."""
    rows = len(q)
    length = len(k)
    mask = None
    if causal and rows < length:
        mask = torch.ones(rows, length, dtype=torch.bool, device=q.device).tril(length - rows)
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    mixed = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        is_causal=causal and mask is None,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return mixed[0].transpose(0, 1)


def open_cuda(device: str) -> CudaOps:
    """Take the GPU `device` ("cuda:N"). ToolkitError with the command that fixes it if torch sees
    none."""
    count = torch.cuda.device_count()
    index = int(device.split(":")[1])
    if torch.version.cuda is None:
        raise ToolkitError(
            f"--device {device} needs a torch built for CUDA, this is {torch.__version__}; run: pip "
            "install torch --index-url https://download.pytorch.org/whl/cu130",
            MISSING_COMPONENT,
        )
    if index >= count:
        raise ToolkitError(
            f"--device {device}: torch sees {count} GPUs; check `nvidia-smi` and "
            "CUDA_VISIBLE_DEVICES",
            MISSING_COMPONENT,
        )
    torch.cuda.set_device(index)
    return CudaOps(device)
