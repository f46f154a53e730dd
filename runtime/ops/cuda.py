"""The operator set on NVIDIA GPUs: the reference's arithmetic with torch's fused norms and scaled-dot-product attention.

A decode step (one new token per sequence) takes its lengths from device memory and gathers whole block tables, so that it
can be recorded as a CUDA graph; prompts run sequence by sequence. The vision encoder stays on the host.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from models.network.decoder import Step
from runtime.common.errors import MISSING_COMPONENT, ToolkitError

from .reference import ReferenceOps, shifted

HALVES = ("bfloat16", "float16")


@dataclass
class CudaStep(Step):
    """kv_tensor int64 [B] on the device: lengths, where every sequence has one new token."""

    kv_tensor: torch.Tensor | None = None


class CudaOps(ReferenceOps):
    name = "cuda"
    records_graphs = True

    def __init__(self, device: str):
        self.device = device

    def check(self, dtype: str, block_size: int):
        if dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise ToolkitError(
                f"--dtype bfloat16 is not computed by {torch.cuda.get_device_name(self.device)}; use --dtype "
                "float16"
            )

    def default_dtype(self, family) -> str:
        """What --dtype auto means: the dtype of the released weights if the GPU computes in it."""
        released = family.config.get("torch_dtype") or family.config.get("dtype")
        fits = released in HALVES and (
            released == "float16" or torch.cuda.is_bf16_supported(including_emulation=False)
        )
        return released if fits else "float16"

    def free_memory(self) -> int:
        """Bytes free on the device."""
        return torch.cuda.mem_get_info(self.device)[0]

    accelerator = property(lambda self: torch.cuda)  # the module that records graphs

    def new_graph(self, step):
        """(graph, what `torch.cuda.graph` is told)"""
        return torch.cuda.CUDAGraph(), {}

    def begin(self, step, config, device):
        step = super().begin(step, config, device)
        one_each = step.causal and max(step.q_lens) == 1
        return CudaStep(
            **vars(step), kv_tensor=torch.tensor(step.kv_lens, device=device) if one_each else None
        )

    def layer_norm(self, x, norm, eps):
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, eps)

    def rms_norm(self, x, norm, eps):
        return shifted(F.rms_norm(x, x.shape[-1:], norm.weight, eps), norm)

    def cache_write(self, k, v, keys, values, slots):
        keys.view(-1, *keys.shape[2:]).index_copy_(0, slots, k)
        values.view(-1, *values.shape[2:]).index_copy_(0, slots, v)

    def attention(self, q, k, v, keys, values, step):
        if step.kv_tensor is not None:
            return _decode(
                q, *(_blocks(cache, step.block_table) for cache in (keys, values)), step.kv_tensor
            )
        outputs = []
        for rows, table, length in zip(q.split(step.q_lens), step.block_table, step.kv_lens):
            outputs.append(
                _prompt(
                    rows,
                    *(_blocks(cache, table[None])[0, :length] for cache in (keys, values)),
                    step.causal,
                )
            )
        return torch.cat(outputs)


def _blocks(cache, tables):
    """Cache [blocks, block_size, kv_heads, head_dim], tables [B, n] -> [B, n * block_size, kv_heads, head_dim]."""
    rows = cache.index_select(0, tables.flatten())
    return rows.view(len(tables), -1, *cache.shape[2:])


def _decode(q, k, v, lengths):
    """q [B, heads, head_dim] against the first `lengths` of k, v [B, n, kv_heads, head_dim]: the queries that share a key
    head are rows of one product."""
    seen = torch.arange(k.shape[1], device=q.device) < lengths[:, None]
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    mixed = F.scaled_dot_product_attention(
        q.view(len(q), k.shape[1], -1, q.shape[2]), k, v, attn_mask=seen[:, None, None]
    )
    return mixed.reshape(q.shape)


def _prompt(q, k, v, causal):
    """q [rows, heads, head_dim] against k, v [length, kv_heads, head_dim], of which the last `rows` are its own."""
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
    """Take the GPU `device` ("cuda:N"). ToolkitError with the line that helps when torch sees none."""
    count = torch.cuda.device_count()
    index = int(device.split(":")[1])
    if torch.version.cuda is None:
        raise ToolkitError(
            f"--device {device} needs a torch built for CUDA, this is {torch.__version__}; run: pip install "
            "torch --index-url https://download.pytorch.org/whl/cu130",
            MISSING_COMPONENT,
        )
    if index >= count:
        raise ToolkitError(
            f"--device {device}: torch sees {count} GPUs; check `nvidia-smi` and CUDA_VISIBLE_DEVICES",
            MISSING_COMPONENT,
        )
    torch.cuda.set_device(index)
    return CudaOps(device)
