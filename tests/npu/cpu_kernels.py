"""torch_npu's operators on CPU tensors: the wheel's own schemas, and behind them plain arithmetic
that refuses what the chips refuse.

`schemas.txt` holds the 462 operator schemas of torch_npu 2.13.0. They are declared in a torch
without torch_npu, so that a wrong keyword or type in our calls is refused by torch's dispatcher;
the kernels below then check layouts and contiguity, and compute. `FakeGraph` stands in for
NPUGraph: it records operator calls and replays them on the same tensors.
"""

from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from models.network.linear import Norm
from runtime.ops.reference import ReferenceOps, sequence_attention

PLAIN = ReferenceOps()
ND, NZ = 2, 29
CHIP = SimpleNamespace(cache_format=NZ, token_multiple=16)  # what the kernels below stand in for
QINT8 = 12  # torch's number of the dtype
_libraries = {}


def declare():
    """Declare all schemas and register the kernels; once per process."""
    if _libraries:
        return
    for space in ("npu", "atb"):
        _libraries[space] = torch.library.Library(space, "FRAGMENT")
    for line in Path(__file__).with_name("schemas.txt").read_text(encoding="utf-8").splitlines():
        space, schema = line.split("::", 1)
        _libraries[space].define(schema)
    for space, kernels in (("npu", NPU), ("atb", ATB)):
        for name, kernel in kernels.items():
            _libraries[space].impl(name, kernel, "CPU")


def stand_in_for(soc):
    """From now on ATB's kernels want the cache and the padding that those of `soc` want."""
    CHIP.cache_format = soc.cache_format
    CHIP.token_multiple = soc.token_multiple


# npu::


def format_cast(x, acl_format, *, customize_dtype=None, input_dtype=None):
    assert acl_format == NZ and x.is_contiguous()
    return x.clone()


def rms_norm(x, gamma, epsilon=1e-6):
    return PLAIN.rms_norm(x, Norm(gamma), epsilon), x.new_zeros(len(x), 1)


def add_rms_norm(x1, x2, gamma, epsilon=1e-6):
    y, total = PLAIN.add_rms_norm(x1, x2, Norm(gamma), epsilon)
    return y, x1.new_zeros(len(x1), 1), total


def gelu(x, *, approximate="none"):
    return torch.nn.functional.gelu(x, approximate=approximate)


def apply_rotary_pos_emb(query, key, cos, sin, layout="BSND", rotary_mode="half"):
    """In place, whatever the schema says."""
    assert (
        layout == "BSND" and rotary_mode == "half" and query.is_contiguous() and key.is_contiguous()
    )
    assert (
        query.shape[:2] == key.shape[:2] == cos.shape[:2] == sin.shape[:2]
        and cos.shape[2] == sin.shape[2] == 1
    )
    for x, rotated in zip((query, key), PLAIN.rope(query[0], key[0], cos[0, :, 0], sin[0, :, 0])):
        x[0] = rotated
    return query, key


def scatter_pa_kv_cache(
    key,
    value,
    key_cache,
    value_cache,
    slot_mapping,
    *,
    compress_lens=None,
    compress_seq_offsets=None,
    seq_lens=None,
    cache_mode="PA_NZ",
):
    assert (
        cache_mode == "Norm"
        and key_cache.dim() == 4
        and key.is_contiguous()
        and value.is_contiguous()
    )
    _check_slots(slot_mapping, key)
    PLAIN.cache_write(key, value, key_cache, value_cache, slot_mapping.long())


def scatter_nd_update(input, indices, updates):
    """input [slots, ...], indices [T, 1], updates [T, ...]: in place."""
    assert input.is_contiguous() and indices.dtype == torch.int32 and indices.shape[1:] == (1,)
    assert updates.dtype == input.dtype and updates.shape[1:] == input.shape[1:]
    input[indices[:, 0].long()] = updates
    return input


def fused_infer(
    query,
    key,
    value,
    *,
    atten_mask=None,
    actual_seq_lengths=None,
    actual_seq_lengths_kv=None,
    block_table=None,
    num_heads=1,
    scale=1.0,
    input_layout="BSH",
    num_key_value_heads=0,
    sparse_mode=0,
    block_size=0,
    **unused,
):
    """Paged, packed queries; running sums of the query lengths, plain lengths of the cached
    sequences."""
    assert (
        input_layout == "TND"
        and sparse_mode == 3
        and query.is_contiguous()
        and not any(unused.values())
    )
    _check_mask(atten_mask, torch.int8, 1)
    assert block_table.dtype == torch.int32 and key.shape[1] == block_size
    assert actual_seq_lengths[-1] == len(query) and num_heads == query.shape[1]
    _check_scale(scale, query)
    key, value = (t.unflatten(2, (num_key_value_heads, -1)) for t in (key, value))
    q_lens = [end - start for start, end in zip([0, *actual_seq_lengths], actual_seq_lengths)]
    return _paged_attention(
        query, key, value, block_table, q_lens, actual_seq_lengths_kv
    ), query.new_zeros(0)


def fusion_attention(
    query,
    key,
    value,
    head_num,
    input_layout,
    pse=None,
    padding_mask=None,
    atten_mask=None,
    scale=1.0,
    keep_prob=1.0,
    pre_tockens=0,
    next_tockens=0,
    inner_precise=0,
    prefix=None,
    actual_seq_qlen=None,
    actual_seq_kvlen=None,
    sparse_mode=0,
    *unused,
):
    """Packed, no mask: every token sees its whole sequence."""
    assert (
        input_layout == "TND"
        and atten_mask is None
        and sparse_mode == 0
        and head_num == query.shape[1]
    )
    assert actual_seq_qlen == actual_seq_kvlen and actual_seq_qlen[-1] == len(query)
    _check_scale(scale, query)
    lens = [end - start for start, end in zip([0, *actual_seq_qlen], actual_seq_qlen)]
    nothing = query.new_zeros(0)
    return (
        _packed_attention(query, key, value, lens, causal=False),
        nothing,
        nothing,
        nothing,
        0,
        0,
        0,
    )


def quantize(input, scales, zero_points, dtype, axis=1, div_mode=True):
    """x * scale + offset per channel, in float32."""
    assert (
        dtype == QINT8
        and axis == -1
        and not div_mode
        and scales.dtype == zero_points.dtype == input.dtype != torch.float32
    )
    assert scales.shape == zero_points.shape == input.shape[-1:]
    return (
        (input.float() * scales.float() + zero_points.float())
        .round()
        .clamp(-128, 127)
        .to(torch.int8)
    )


def dynamic_quant(
    input,
    *,
    smooth_scales=None,
    group_index=None,
    dst_type=None,
    quant_mode="pertoken",
    dst_type_max=0.0,
):
    assert input.dtype in (torch.float16, torch.bfloat16) and quant_mode == "pertoken"
    scale = input.float().abs().amax(-1) / 127
    return (input.float() / scale[:, None]).round().clamp(-128, 127).to(torch.int8), scale


def trans_quant_param(scale, offset=None, round_mode=0):
    assert scale.dtype == torch.float32 and offset is None
    return scale.view(torch.int32).to(torch.int64)


def quant_matmul(
    x1, x2, scale, *, offset=None, pertoken_scale=None, bias=None, output_dtype=None, **unused
):
    """x1 [T, k], x2 [k, n]; int64 scales hold float32 bits, which bfloat16 results and token scales
    do not take."""
    assert (
        x1.dtype == x2.dtype == torch.int8
        and max(x2.shape) < 65536
        and not any(unused.values())
        and offset is None
    )
    total = x1.double() @ x2.double()
    if pertoken_scale is not None:
        assert (
            scale.dtype == pertoken_scale.dtype == torch.float32
            and bias is None
            and len(pertoken_scale) == len(x1)
        )
        return (total.float() * pertoken_scale[:, None] * scale).to(dtype_of(output_dtype))
    assert bias.dtype == torch.int32 and bias.shape == scale.shape == x2.shape[1:]
    assert (
        scale.dtype == torch.int64
        if dtype_of(output_dtype) == torch.float16
        else scale.dtype == torch.float32
    )
    scale = scale.to(torch.int32).view(torch.float32) if scale.dtype == torch.int64 else scale
    return ((total + bias).float() * scale).to(dtype_of(output_dtype))


def weight_quant_batchmatmul(
    x,
    weight,
    antiquant_scale,
    antiquant_offset=None,
    quant_scale=None,
    quant_offset=None,
    bias=None,
    **unused,
):
    assert (
        weight.dtype == torch.int8 and antiquant_scale.dtype == x.dtype and antiquant_offset is None
    )
    return torch.nn.functional.linear(x, (weight * antiquant_scale).t(), bias)


def dtype_of(number):
    """A dtype argument as the kernels get it: torch's number."""
    return {5: torch.float16, 15: torch.bfloat16}[number]


# atb::


def reshape_and_cache(key, value, key_cache, value_cache, slot_indices):
    assert key.is_contiguous() and value.is_contiguous()
    _check_slots(slot_indices, key)
    if CHIP.cache_format == ND:
        PLAIN.cache_write(key, value, key_cache, value_cache, slot_indices.long())
        return
    for rows, cache in ((key, key_cache), (value, value_cache)):
        assert cache.shape[3] == 16 and cache.shape[1] * 16 == rows[0].numel()
        blocks = slot_indices.long() // cache.shape[2]
        offsets = slot_indices.long() % cache.shape[2]
        cache[blocks, :, offsets] = rows.reshape(len(rows), -1, 16)


def flash_attention(
    query, key, value, mask, seq_len, scale_value, num_heads, num_kv_heads, *, mask_type=3, out
):
    assert mask_type == 3 and mask.shape == (1, 128, 2048, 16)
    _check_mask(mask[0].transpose(0, 1).flatten(1), torch.float16, float("-inf"))
    _flash(query, key, value, seq_len, scale_value, num_heads, num_kv_heads, out, causal=True)


def flash_attention_unpad(query, key, value, seq_len, scale_value, num_heads, num_kv_heads, out):
    _flash(query, key, value, seq_len, scale_value, num_heads, num_kv_heads, out, causal=False)


def flash_attention_masked(
    query, key, value, mask, seq_len, scale_value, num_heads, num_kv_heads, out
):
    """310P: the whole causal mask, as large as the longest prompt."""
    size = max(seq_len.tolist())
    whole = torch.full((size, size), float("-inf"), dtype=torch.float16).triu(1)
    _check_tiles(mask, whole)
    _flash(query, key, value, seq_len, scale_value, num_heads, num_kv_heads, out, causal=True)


def flash_attention_qlens(
    query,
    key_cache,
    value_cache,
    block_table,
    mask,
    seq_len,
    context_lens,
    num_kv_heads,
    num_heads,
    scale_value,
    out,
):
    """910B: paged, the last query of a sequence sees its last key."""
    hidden = float("-inf") if query.dtype == torch.float16 else 1
    assert torch.equal(mask, torch.full((128, 128), hidden, dtype=query.dtype).triu(1))
    assert seq_len.dtype == torch.int32 and key_cache.shape[2] == num_kv_heads
    _check_paged(query, block_table, context_lens, scale_value, num_heads)
    lens = (seq_len.tolist(), context_lens.tolist())
    out.copy_(_paged_attention(query, key_cache, value_cache, block_table, *lens))


def splitfuse_masked(
    query,
    key_cache,
    value_cache,
    block_table,
    context_lens,
    mask,
    seq_len,
    num_kv_heads,
    num_heads,
    scale_value,
    out,
):
    """310P: a row of the mask for each query."""
    q_lens, kv_lens = seq_len.tolist(), context_lens.tolist()
    size = max(kv_lens)
    whole = torch.full((size, size), float("-inf"), dtype=torch.float16).triu(1)
    _check_tiles(mask, torch.cat([whole[kv - q : kv] for q, kv in zip(q_lens, kv_lens)]))
    _check_paged(query, block_table, context_lens, scale_value, num_heads)
    keys, values = (_tokens_first(cache, num_kv_heads) for cache in (key_cache, value_cache))
    out.copy_(_paged_attention(query, keys, values, block_table, q_lens, kv_lens))


def splitfuse(
    query,
    key_cache,
    value_cache,
    block_table,
    context_lens,
    mask,
    seq_len,
    num_kv_heads,
    num_heads,
    scale_value,
    *,
    mask_type=5,
    out,
):
    assert mask_type == 5
    _check_mask(mask, torch.float16, -1e4)
    _check_paged(query, block_table, context_lens, scale_value, num_heads)
    keys, values = (_tokens_first(cache, num_kv_heads) for cache in (key_cache, value_cache))
    out.copy_(
        _paged_attention(query, keys, values, block_table, seq_len.tolist(), context_lens.tolist())
    )


def paged_attention(
    query,
    key_cache,
    value_cache,
    num_kv_heads,
    num_heads,
    scale_value,
    block_table,
    context_lens,
    out,
    *,
    workspace=None,
):
    _check_paged(query, block_table, context_lens, scale_value, num_heads)
    keys, values = (_tokens_first(cache, num_kv_heads) for cache in (key_cache, value_cache))
    out.copy_(
        _paged_attention(query, keys, values, block_table, [1] * len(query), context_lens.tolist())
    )


# arithmetic and checks they share


def _packed_attention(q, k, v, lens, causal):
    parts = zip(*(t.split(lens) for t in (q, k, v)))
    return torch.cat([sequence_attention(*part, causal=causal) for part in parts])


def _paged_attention(q, keys, values, table, q_lens, kv_lens):
    step = SimpleNamespace(
        q_lens=list(q_lens), kv_lens=list(kv_lens), block_table=table, causal=True
    )
    return PLAIN.attention(q, None, None, keys, values, step)


def _flash(q, k, v, lens, scale, heads, kv_heads, out, causal):
    assert lens.dtype == torch.int32 and int(lens.sum()) == len(q)
    assert len(q) % CHIP.token_multiple == 0
    assert q.is_contiguous() and k.is_contiguous() and v.is_contiguous() and out.is_contiguous()
    assert q.shape[1] == heads and k.shape[1] == kv_heads
    _check_scale(scale, q)
    out.copy_(_packed_attention(q, k, v, lens.tolist(), causal))


def _tokens_first(cache, kv_heads):
    """[blocks, kv_heads * head_dim / 16, block_size, 16] -> [blocks, block_size, kv_heads,
    head_dim], which it is where caches are plain."""
    if CHIP.cache_format == ND:
        assert cache.shape[2] == kv_heads
        return cache
    assert cache.shape[3] == 16
    return cache.permute(0, 2, 1, 3).flatten(2).unflatten(2, (kv_heads, -1))


def _check_paged(query, table, lens, scale, heads):
    assert (
        table.dtype == lens.dtype == torch.int32
        and query.is_contiguous()
        and heads == query.shape[1]
    )
    _check_scale(scale, query)


def _check_mask(mask, dtype, hidden):
    """Compressed causal mask: `hidden` above the diagonal (a corner of it is looked at)."""
    corner = torch.full((40, 40), hidden, dtype=dtype).triu(1)
    assert (
        mask.shape == (2048, 2048) and mask.dtype == dtype and torch.equal(mask[:40, :40], corner)
    )


def _check_tiles(mask, expected):
    """[1, columns / 16, rows, 16], filled up with zeros."""
    rows, columns = expected.shape
    assert mask.dtype == torch.float16 and mask.dim() == 4 and mask.is_contiguous()
    plain = mask[0].transpose(0, 1).flatten(1)
    assert plain.shape == (rows + -rows % 16, columns + -columns % 16)
    assert (
        torch.equal(plain[:rows, :columns], expected)
        and mask.isinf().sum() == expected.isinf().sum()
    )


def _check_slots(slots, rows):
    assert (
        slots.dtype == torch.int32 and len(slots) == len(rows) and len(slots.unique()) == len(slots)
    )


def _check_scale(scale, query):
    assert abs(scale - query.shape[-1] ** -0.5) < 1e-9


NPU = {
    "npu_format_cast": format_cast,
    "npu_rms_norm": rms_norm,
    "npu_add_rms_norm": add_rms_norm,
    "npu_gelu": gelu,
    "npu_swiglu": lambda x, dim=-1: PLAIN.swiglu(x),
    "npu_apply_rotary_pos_emb": apply_rotary_pos_emb,
    "npu_scatter_pa_kv_cache": scatter_pa_kv_cache,
    "npu_scatter_nd_update_": scatter_nd_update,
    "npu_fused_infer_attention_score": fused_infer,
    "npu_fusion_attention": fusion_attention,
    "npu_quantize": quantize,
    "npu_dynamic_quant": dynamic_quant,
    "npu_trans_quant_param": trans_quant_param,
    "npu_quant_matmul": quant_matmul,
    "npu_weight_quant_batchmatmul": weight_quant_batchmatmul,
}
ATB = {
    "_npu_reshape_and_cache": reshape_and_cache,
    "_npu_flash_attention_v3": flash_attention,
    "_npu_flash_attention": flash_attention_masked,
    "_npu_flash_attention_qlens": flash_attention_qlens,
    "_npu_paged_attention_splitfuse": splitfuse_masked,
    "_npu_flash_attention_unpad": flash_attention_unpad,
    "_npu_paged_attention_splitfuse_v2": splitfuse,
    "_npu_paged_attention": paged_attention,
}


# torch.npu


class FakeGraph(TorchDispatchMode):
    """Records the operator calls made inside `torch.npu.graph` and replays them on the same
    tensors.

    With host lengths a replay waits for `update`, as the real graph's attention kernels do.
    """

    def __init__(self):
        super().__init__()
        self.calls = []
        self.waits_for_update = False
        self.replays = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, out))
        return out

    def replay(self):
        self.replays += 1
        if not self.waits_for_update:
            self._run()

    def update(self, cpu_update_input):
        assert self.waits_for_update
        (new,) = cpu_update_input
        for _, _, kwargs, _ in self.calls:
            kwargs.update({name: value for name, value in new.items() if name in kwargs})
        self._run()

    def _run(self):
        for func, args, kwargs, recorded in self.calls:
            for old, new in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def fake_graph_context(graph, pool=None, auto_dispatch_capture=False):
    graph.waits_for_update = auto_dispatch_capture
    return graph


FAKE_TORCH_NPU = SimpleNamespace(
    NPUGraph=FakeGraph,
    graph=fake_graph_context,
    graph_pool_handle=lambda: None,
    synchronize=lambda: None,
    mem_get_info=lambda device: (1 << 34, 1 << 34),
    memory_reserved=lambda device: 0,
    memory_allocated=lambda device: 0,
    max_memory_allocated=lambda device: 0,
)


def in_place():
    """Context: torch as if torch_npu were there."""
    declare()
    return mock.patch.object(torch, "npu", FAKE_TORCH_NPU, create=True)
