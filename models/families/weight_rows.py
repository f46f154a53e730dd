"""Table rows of checkpoints in transformers' own layout: decoders, towers and adapters.

Takes decoder settings and the names in a checkpoint, returns table rows. One architecture is saved
under several prefixes (model.X, language_model.model.X, ...); `prefix` reads from the checkpoint's
names which one it is.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial

from models.checkpoint.table import Part, Weight, dense, one_to_one, pair
from models.config import DecoderConfig
from models.network.rope import permute_heads

# computed tables that older releases of transformers saved
BUFFERS = ("rotary_emb.inv_freq", "position_ids")


def prefix(names: Iterable[str], ending: str, default: str) -> str:
    """What stands before `ending` in the first name that ends so; `default` when there is none."""
    for name in sorted(names):
        if name.endswith(ending):
            return name.removesuffix(ending)
    return default


def output_matrix(names, default: str, tied: bool | None) -> str | None:
    """Name of the output matrix; None if it is `tied` to the embeddings and not stored."""
    head = prefix(names, "lm_head.weight", default) + "lm_head.weight"
    return None if tied and names and head not in names else head


def decoder_weights(
    d: DecoderConfig,
    root: str,
    head: str | None,
    order=None,
    qkv_bias=False,
    out_bias=False,
    mlp_bias=False,
    fused_mlp=False,
) -> Iterator[Weight]:
    """Rows of a LLaMA-like decoder under `root`.

    head: name of the output matrix; None: the embeddings are used for it too. order [head_dim]
    permutes the q and k rows of every head; None: they are in our order already. fused_mlp: gate
    and up are one matrix.
    """
    rotated = None
    if order is not None:
        rotated = partial(permute_heads, order=order)
    q = d.heads * d.head_dim
    kv = d.kv_heads * d.head_dim
    matrix = (d.vocab_size, d.hidden)
    embed = Part("embed.weight")
    output = Part("lm_head.weight")
    if head:
        yield Weight(root + "embed_tokens.weight", matrix, (embed,))
        yield Weight(head, matrix, (output,))
    else:
        yield Weight(root + "embed_tokens.weight", matrix, (embed, output))
    yield from pair(root + "norm", (d.hidden,), "final_norm", bias=False)
    for i in range(d.layers):
        layer = f"{root}layers.{i}."
        ours = f"layers.{i}."
        yield from pair(layer + "input_layernorm", (d.hidden,), ours + "attention_norm", bias=False)
        projections = (("q_proj", q, rotated), ("k_proj", kv, rotated), ("v_proj", kv, None))
        yield from joined(layer + "self_attn.", projections, d.hidden, ours + "qkv", qkv_bias)
        yield from pair(layer + "self_attn.o_proj", (d.hidden, q), ours + "out", bias=out_bias)
        yield from pair(
            layer + "post_attention_layernorm", (d.hidden,), ours + "mlp_norm", bias=False
        )
        if d.post_norms:
            yield from _post_norms(layer, d.hidden, ours)
        gates = [("gate_proj", d.ffn, None), ("up_proj", d.ffn, None)]
        if fused_mlp:
            gates = [("gate_up_proj", 2 * d.ffn, None)]
        yield from joined(layer + "mlp.", gates, d.hidden, ours + "up", mlp_bias)
        yield from pair(layer + "mlp.down_proj", (d.hidden, d.ffn), ours + "down", bias=mlp_bias)


def _post_norms(layer: str, width: int, target: str) -> Iterator[Weight]:
    """Rows of the norms behind a GLM-4-0414 layer's branches; the one before its MLP is called
    post_attention_layernorm, as in LLaMA."""
    for name, ours in (
        ("post_self_attn_layernorm", "attention_post_norm"),
        ("post_mlp_layernorm", "mlp_post_norm"),
    ):
        yield from pair(layer + name, (width,), target + ours, bias=False)


def joined(
    root: str,
    projections: Sequence[tuple[str, int, Callable | None]],
    inputs: int,
    target: str,
    bias: bool,
) -> Iterator[Weight]:
    """Rows of several linear layers whose rows follow one another in `target`.

    projections: (name, outputs, transform of its rows) of each.
    """
    total = sum(outputs for _, outputs, _ in projections)
    offset = 0
    for name, outputs, transform in projections:
        place = {"at": (offset, total), "transform": transform}
        part = Part(target + ".weight", **place)
        yield Weight(f"{root}{name}.weight", (outputs, inputs), (part,))
        if bias:
            part = Part(target + ".bias", **place)
            yield Weight(f"{root}{name}.bias", (outputs,), (part,))
        offset += outputs


def tower_block(root: str, width: int, inner: int, target: str) -> Iterator[Weight]:
    """Rows of one CLIP or SigLIP encoder layer -> vision.PreNormBlock."""
    yield from pair(root + "layer_norm1", (width,), target + "attention_norm")
    for name, ours in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "out")):
        yield from dense(f"{root}self_attn.{name}", width, width, f"{target}attention.{ours}")
    yield from pair(root + "layer_norm2", (width,), target + "mlp_norm")
    yield from dense(root + "mlp.fc1", inner, width, target + "mlp.up")
    yield from dense(root + "mlp.fc2", width, inner, target + "mlp.down")


def unused(rows: Iterable[Weight]) -> Iterator[Weight]:
    """The same rows, known and dropped; a checkpoint may leave them out."""
    for row in rows:
        yield replace(row, parts=(), optional=True)


def buffers(shapes: dict[str, tuple[int, ...]]) -> Iterator[Weight]:
    """Rows that drop the computed tables a checkpoint carries."""
    for name, shape in shapes.items():
        if name.endswith(BUFFERS):
            yield Weight(name, shape, optional=True)


def glu_adapter_weights(source: str, target: str, width: int, hidden: int, inner: int):
    """Table rows of a GluAdapter; `source` and `target` are prefixes with their dot."""
    yield from pair(source + "conv", (hidden, width, 2, 2), target + "conv")
    yield from dense(
        source + "linear_proj.linear_proj", hidden, hidden, target + "project", bias=False
    )
    yield from pair(source + "linear_proj.norm1", (hidden,), target + "norm")
    yield from dense(source + "linear_proj.gate_proj", inner, hidden, target + "gate", bias=False)
    yield from dense(source + "linear_proj.dense_h_to_4h", inner, hidden, target + "up", bias=False)
    yield from dense(
        source + "linear_proj.dense_4h_to_h", hidden, inner, target + "down", bias=False
    )
    for mark in ("boi", "eoi"):
        yield one_to_one(source + mark, (1, 1, hidden), target + mark)
