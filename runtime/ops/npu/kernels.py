"""Attention and cache-write kernels of the NPU, by the names that the SoC table gives them.

Attention takes (ops, q, k, v, key cache, value cache, step) and returns [rows, heads, head_dim];
a cache write takes (k, v, key cache, value cache, slots) and returns nothing.
"""

import torch

SPLITFUSE_MASKED = -10000.0
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
        atten_mask=ops.mask_int8,
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
        mask=ops.mask_tiles,
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
        mask=ops.mask_additive,
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


ATTENTION = {
    "fused_infer": _fused_infer,
    "fusion": _fusion,
    "flash": _flash,
    "flash_unpadded": _flash_unpadded,
    "splitfuse": _splitfuse,
    "paged": _paged,
}


def _scatter(k, v, keys, values, slots):
    torch.ops.npu.npu_scatter_pa_kv_cache(k, v, keys, values, slots, cache_mode="Norm")


def _reshape_and_cache(k, v, keys, values, slots):
    torch.ops.atb._npu_reshape_and_cache(k, v, keys, values, slots)


WRITES = {"scatter": _scatter, "reshape_and_cache": _reshape_and_cache}
