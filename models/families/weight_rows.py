"""What checkpoints in transformers' own layout share: spellings of config fields, and the weight names of decoders and
towers. A config and the names in a checkpoint flow in, table rows flow out.

One architecture is saved under several prefixes (model.X, language_model.model.X, ...). `prefix` reads from the
checkpoint's names which one it is.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from models.checkpoint.table import Part, Weight, dense, pair
from models.config import DecoderConfig
from models.network.rope import permute_heads

BUFFERS = (
    "rotary_emb.inv_freq",
    "position_ids",
)  # tables that older releases of transformers saved


def prefix(names: Iterable[str], ending: str, default: str) -> str:
    """What stands before `ending` in the name that ends so; `default` when there is none."""
    return next(
        (name.removesuffix(ending) for name in sorted(names) if name.endswith(ending)), default
    )


def output_matrix(names, default: str, tied: bool | None) -> str | None:
    """Name of the output matrix; None if it is `tied` to the embeddings and the checkpoint does not store it."""
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
    """Rows of a LLaMA-like decoder under `root`. `head`: name of the output matrix, None = the embeddings serve for it.

    `order` [head_dim] permutes the q and k rows of every head (None: they stand right already); `fused_mlp`: gate and
    up are one matrix.
    """
    rotated = (lambda rows: permute_heads(rows, order)) if order is not None else None
    q = d.heads * d.head_dim
    kv = d.kv_heads * d.head_dim
    tied = () if head else (Part("lm_head.weight"),)
    yield Weight(
        root + "embed_tokens.weight", (d.vocab_size, d.hidden), (Part("embed.weight"), *tied)
    )
    if head:
        yield Weight(head, (d.vocab_size, d.hidden), (Part("lm_head.weight"),))
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
        gates = (
            [("gate_up_proj", 2 * d.ffn)]
            if fused_mlp
            else [("gate_proj", d.ffn), ("up_proj", d.ffn)]
        )
        yield from joined(
            layer + "mlp.", [(*gate, None) for gate in gates], d.hidden, ours + "up", mlp_bias
        )
        yield from pair(layer + "mlp.down_proj", (d.hidden, d.ffn), ours + "down", bias=mlp_bias)


def joined(
    root: str,
    projections: Sequence[tuple[str, int, Callable | None]],
    inputs: int,
    target: str,
    bias: bool,
) -> Iterator[Weight]:
    """Rows of linear layers (name, outputs, transform of their rows) that lie one below the other in `target`."""
    total = sum(outputs for _, outputs, _ in projections)
    offset = 0
    for name, outputs, transform in projections:
        for suffix, shape in ((".weight", (outputs, inputs)), (".bias", (outputs,)))[: 1 + bias]:
            yield Weight(
                root + name + suffix,
                shape,
                (Part(target + suffix, at=(offset, total), transform=transform),),
            )
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
    return (replace(row, parts=(), optional=True) for row in rows)


def buffers(shapes: dict[str, tuple[int, ...]]) -> Iterator[Weight]:
    """Rows that drop the computed tables a checkpoint carries."""
    return (
        Weight(name, shape, optional=True)
        for name, shape in shapes.items()
        if name.endswith(BUFFERS)
    )


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
        yield Weight(source + mark, (1, 1, hidden), (Part(target + mark),))
