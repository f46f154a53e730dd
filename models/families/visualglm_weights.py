"""Tables of VisualGLM's vision tower and Q-Former, and its layouts of q, k and v.

Takes the parts of its config, yields Weights; takes stored rows, returns them as the decoder has them.
"""

import torch

from models.checkpoint.table import dense, fused_dense, one_to_one, pair
from models.network.rope import permute_heads


def vit_weights(root, eva, patches: int):
    """Of EVA-ViT; patches: of an image."""
    width = eva["hidden_size"]
    inner = eva["inner_hidden_size"]
    patch = eva["patch_size"]
    embedding = root + "mixins.patch_embedding.proj"
    yield from pair(embedding, (width, 3, patch, patch), "vision.vit.patch")
    yield from pair(root + "mixins.cls.ln_vision", (width,), "vision.vit.norm")
    yield one_to_one(root + "transformer.word_embeddings.weight", (1, width), "vision.vit.cls")
    position = root + "transformer.position_embeddings.weight"
    yield one_to_one(position, (1 + patches, width), "vision.vit.position")
    for i in range(eva["num_layers"]):
        layer = f"{root}transformer.layers.{i}."
        ours = f"vision.vit.blocks.{i}."
        yield from pair(layer + "input_layernorm", (width,), ours + "attention_norm")
        qkv = layer + "attention.query_key_value"
        yield from fused_dense(qkv, width, width, ours + "attention.", "qkv")
        yield from dense(layer + "attention.dense", width, width, ours + "attention.out")
        yield from pair(layer + "post_attention_layernorm", (width,), ours + "mlp_norm")
        yield from dense(layer + "mlp.dense_h_to_4h", inner, width, ours + "mlp.up")
        yield from dense(layer + "mlp.dense_4h_to_h", width, inner, ours + "mlp.down")


def qformer_weights(root, config, rows):
    """rows: the learned queries."""
    width = config["hidden_size"]
    context = config["cross_attn_hidden_size"]
    inner = config.get("inner_hidden_size") or 4 * width
    yield one_to_one(root + "word_embeddings.weight", (rows, width), "vision.qformer.queries")
    yield from pair(root + "final_layernorm", (width,), "vision.qformer.norm")
    for i, cross in enumerate(config["is_decoder"]):
        layer = f"{root}layers.{i}."
        ours = f"vision.qformer.layers.{i}."
        yield from pair(layer + "input_layernorm", (width,), ours + "input_norm")
        qkv = layer + "attention.query_key_value"
        yield from fused_dense(qkv, width, width, ours + "attention.", "qkv")
        yield from dense(layer + "attention.dense", width, width, ours + "attention.out")
        yield from pair(layer + "post_attention_layernorm", (width,), ours + "attention_norm")
        if cross:
            yield from dense(layer + "cross_attention.query", width, width, ours + "cross.q")
            kv = layer + "cross_attention.key_value"
            yield from fused_dense(kv, width, context, ours + "cross.", "kv")
            yield from dense(layer + "cross_attention.dense", width, width, ours + "cross.out")
            yield from pair(layer + "post_cross_attention_layernorm", (width,), ours + "cross_norm")
        yield from dense(layer + "mlp.dense_h_to_4h", inner, width, ours + "mlp.up")
        yield from dense(layer + "mlp.dense_4h_to_h", width, inner, ours + "mlp.down")


def fold_head_major_qkv(rows, heads, order):
    """Released layout: rows per head (q, k, v) -> [q; k; v], q and k in our rotary order."""
    q, k, v = rows.view(heads, 3, len(order), *rows.shape[1:]).unbind(1)
    return torch.cat((q[:, order], k[:, order], v)).reshape(rows.shape)


def fold_sat_qkv(rows, heads, order):
    """SAT layout: rows are [q; k; v] already."""
    q, k, v = rows.chunk(3)
    return torch.cat((permute_heads(q, order), permute_heads(k, order), v))
