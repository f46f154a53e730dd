"""Attention and cache-write kernels of the NPU, by the names that the SoC table gives them.

Attention takes (ops, q, k, v, key cache, value cache, step) and returns [rows, heads, head_dim];
a cache write takes (k, v, key cache, value cache, slots) and returns nothing. A kernel is used
where the loaded torch_npu declares its operator with the arguments that we give it: releases
differ.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from runtime.ascend.socs import KernelSet

from .masks import Masks

CAUSAL_BOTTOM_RIGHT = 3  # fused_infer's sparse_mode: the last query row sees the last key
COMPRESSED, COMPRESSED_PAGED = 3, 5  # ATB's mask_type


def _shape(q, k):
    """Head counts and softmax scale under ATB's names."""
    return {"num_heads": q.shape[1], "num_kv_heads": k.shape[1], "scale_value": q.shape[2] ** -0.5}


def _fused_infer(ops, q, k, v, keys, values, step):
    return torch.ops.npu.npu_fused_infer_attention_score(
        q,
        keys.flatten(2),
        values.flatten(2),
        atten_mask=ops.masks.int8,
        actual_seq_lengths=step.q_ends,
        actual_seq_lengths_kv=step.kv_lens,
        block_table=step.block_table,
        num_heads=q.shape[1],
        num_key_value_heads=k.shape[1],
        scale=q.shape[2] ** -0.5,
        input_layout="TND",
        sparse_mode=CAUSAL_BOTTOM_RIGHT,
        block_size=keys.shape[1],
    )[0]


def _fusion(ops, q, k, v, keys, values, step):
    return torch.ops.npu.npu_fusion_attention(
        q,
        k,
        v,
        q.shape[1],
        "TND",
        scale=q.shape[2] ** -0.5,
        actual_seq_qlen=step.q_ends,
        actual_seq_kvlen=step.q_ends,
    )[0]


def _flash(ops, q, k, v, keys, values, step):
    out = torch.empty_like(q)
    torch.ops.atb._npu_flash_attention_v3(
        q,
        k,
        v,
        mask=ops.masks.tiles,
        seq_len=step.q_tensor,
        mask_type=COMPRESSED,
        out=out,
        **_shape(q, k),
    )
    return out


def _flash_unpadded(ops, q, k, v, keys, values, step):
    out = torch.empty_like(q)
    torch.ops.atb._npu_flash_attention_unpad(
        q,
        k,
        v,
        seq_len=step.q_tensor,
        out=out,
        **_shape(q, k),
    )
    return out


def _splitfuse(ops, q, k, v, keys, values, step):
    out = torch.empty_like(q)
    torch.ops.atb._npu_paged_attention_splitfuse_v2(
        q,
        keys,
        values,
        mask=ops.masks.additive,
        block_table=step.block_table,
        seq_len=step.q_tensor,
        context_lens=step.kv_tensor,
        mask_type=COMPRESSED_PAGED,
        out=out,
        **_shape(q, k),
    )
    return out


def _paged(ops, q, k, v, keys, values, step):
    out = torch.empty_like(q)
    torch.ops.atb._npu_paged_attention(
        q,
        keys,
        values,
        block_table=step.block_table,
        context_lens=step.kv_tensor,
        out=out,
        **_shape(q, k),
    )
    return out


def _flash_masked(ops, q, k, v, keys, values, step):
    out = torch.empty_like(q)
    torch.ops.atb._npu_flash_attention(
        q,
        k,
        v,
        mask=step.mask,
        seq_len=step.q_tensor,
        out=out,
        **_shape(q, k),
    )
    return out


def _flash_paged(ops, q, k, v, keys, values, step):
    out = torch.empty_like(q)
    torch.ops.atb._npu_flash_attention_qlens(
        q,
        keys,
        values,
        block_table=step.block_table,
        mask=ops.masks.paged(q.dtype),
        seq_len=step.q_tensor,
        context_lens=step.kv_tensor,
        out=out,
        **_shape(q, k),
    )
    return out


def _splitfuse_masked(ops, q, k, v, keys, values, step):
    out = torch.empty_like(q)
    torch.ops.atb._npu_paged_attention_splitfuse(
        q,
        keys,
        values,
        mask=step.mask,
        block_table=step.block_table,
        seq_len=step.q_tensor,
        context_lens=step.kv_tensor,
        out=out,
        **_shape(q, k),
    )
    return out


def _scatter_blocks(k, v, keys, values, slots):
    torch.ops.npu.npu_scatter_pa_kv_cache(k, v, keys, values, slots, cache_mode="Norm")


def _scatter_rows(k, v, keys, values, slots):
    rows = slots[:, None]
    for new, cache in ((k, keys), (v, values)):
        torch.ops.npu.npu_scatter_nd_update_(cache.flatten(0, 1), rows, new)


def _reshape_and_cache(k, v, keys, values, slots):
    torch.ops.atb._npu_reshape_and_cache(k, v, keys, values, slots)


@dataclass(frozen=True)
class Kernel:
    """call: one of the functions above. operator: what it calls, `<namespace>.<name>`; argument:
    one that not every release has. mask: makes `step.mask` of (masks, q_lens, kv_lens), where a
    step needs a mask of its own."""

    call: Callable
    operator: str
    argument: str | None = None
    mask: Callable | None = None

    def declared(self) -> bool:
        """Whether the loaded torch_npu has it."""
        space, name = self.operator.split(".")
        operator = getattr(getattr(torch.ops, space), name, None)
        if operator is None:
            return False
        arguments = {argument.name for argument in operator.default._schema.arguments}
        return self.argument is None or self.argument in arguments


ATTENTION = {
    "fused_infer": Kernel(_fused_infer, "npu.npu_fused_infer_attention_score"),
    "fusion": Kernel(_fusion, "npu.npu_fusion_attention"),
    "flash": Kernel(_flash, "atb._npu_flash_attention_v3"),
    "flash_masked": Kernel(_flash_masked, "atb._npu_flash_attention", mask=Masks.prompt_tiles),
    "flash_paged": Kernel(_flash_paged, "atb._npu_flash_attention_qlens"),
    "flash_unpadded": Kernel(_flash_unpadded, "atb._npu_flash_attention_unpad"),
    "splitfuse": Kernel(_splitfuse, "atb._npu_paged_attention_splitfuse_v2"),
    "splitfuse_masked": Kernel(
        _splitfuse_masked, "atb._npu_paged_attention_splitfuse", mask=Masks.row_tiles
    ),
    "paged": Kernel(_paged, "atb._npu_paged_attention"),
}

WRITES = {
    "scatter_blocks": Kernel(_scatter_blocks, "npu.npu_scatter_pa_kv_cache", "cache_mode"),
    "scatter_rows": Kernel(_scatter_rows, "npu.npu_scatter_nd_update_"),
    "reshape_and_cache": Kernel(_reshape_and_cache, "atb._npu_reshape_and_cache"),
}


def undeclared(kernels: KernelSet) -> list[str]:
    """The operators of the set that the loaded torch_npu lacks, or has without an argument."""
    used = [WRITES[kernels.cache_write], *(ATTENTION[name] for name in kernels.attention.values())]
    return [kernel.operator for kernel in used if not kernel.declared()]
