"""The language decoder of every family: embedding -> layers -> final norm -> logits.

Takes token ids of several sequences, one after another in T, and a `Step` that says where each
begins and which tokens it may see; returns hidden states [T, hidden] and logits [T, vocab]. All
arithmetic goes through an `ops` object (see runtime/ops): the same layers run on plain torch, the
fast CPU kernels or the NPU's.
"""

from dataclasses import dataclass

import torch

from models.config import DecoderConfig

from .linear import Float32Linear, LazyLinear, Linear, Norm, Stacked
from .rope import rotary_angles

LINEARS = ("qkv", "out", "up", "down")
NORMS = ("attention_norm", "mlp_norm")
POST_NORMS = ("attention_post_norm", "mlp_post_norm")  # of a decoder that has them


@dataclass
class Step:
    """One forward pass over the packed tokens of B sequences.

    cos, sin [T, head_dim]: rotary row of every token.  slots int64 [T]: cache slot, block *
    block_size + offset. block_table int32 [B, blocks].  q_lens, kv_lens: per sequence, tokens in
    this step and in the cache after it. causal: a token sees itself and what is before it; else all
    kv_lens tokens (prefix-LM context).
    """

    cos: torch.Tensor
    sin: torch.Tensor
    slots: torch.Tensor
    block_table: torch.Tensor
    q_lens: list[int]
    kv_lens: list[int]
    causal: bool = True


@dataclass
class Layer:
    attention_norm: Norm
    qkv: Linear
    out: Linear
    mlp_norm: Norm
    up: Linear
    down: Linear
    attention_post_norm: Norm | None = None
    mlp_post_norm: Norm | None = None


class LayerArithmetic:
    """What one layer computes, whatever its linear layers and norms are made of: `ops` knows.

    tap: None, or callable(stage, residual stream [T, hidden]) -> the stream to go on with.
    """

    tap = None

    def __init__(self, config: DecoderConfig, ops):
        self.config = config
        self.ops = ops

    def layer(self, residual, layer: Layer, index: int, step, cache):
        """Residual stream [T, hidden] before the layer -> after it."""
        x = self._norm(residual, layer.attention_norm)
        return self._layer(x, residual, layer, index, step, cache, None)[1]

    def _layer(self, x, residual, layer: Layer, index: int, step, cache, next_norm: Norm | None):
        """One layer on the residual stream and on `x`, the stream normalised by `attention_norm`.

        -> (the stream normalised by `next_norm`, the stream) behind the layer, both [T, hidden].
        """
        branch = self._attention(x, layer, index, step, cache)
        x, residual = self._add(branch, layer.attention_post_norm, x, residual, layer.mlp_norm)
        x, residual = self._tapped(f"layers.{index}.attention", x, residual, layer.mlp_norm)
        branch = self._mlp(x, layer)
        x, residual = self._add(branch, layer.mlp_post_norm, x, residual, next_norm)
        return self._tapped(f"layers.{index}.mlp", x, residual, next_norm)

    def _add(self, branch, post_norm: Norm | None, x, residual, norm: Norm | None):
        """Adds a branch's output, normalised by `post_norm` if there is one, -> (the stream
        normalised by `norm`, the stream).

        Without `norm` the first is None.
        """
        branch = self.ops.all_reduce(branch)
        if post_norm is not None:
            branch = self._norm(branch, post_norm)
        alpha = self.config.residual_alpha
        if alpha is not None:  # ChatGLM-6B: the residual is the norm's output times alpha
            residual = self.ops.scaled_add(branch, x, alpha)
            return self._norm(residual, norm), residual
        if norm is None:
            return None, residual + branch
        return self.ops.add_rms_norm(branch, residual, norm, self.config.eps)

    def _tapped(self, stage: str, x, residual, norm: Norm | None):
        """(normalised stream, stream); what the tap put in the stream's place is normalised anew."""
        if self.tap is None:
            return x, residual
        residual = self.tap(stage, residual)
        return self._norm(residual, norm), residual

    def _norm(self, x, norm: Norm | None):
        if norm is None:
            return None
        apply = self.ops.layer_norm if self.config.norm == "layer" else self.ops.rms_norm
        return apply(x, norm, self.config.eps)

    def _attention(self, x, layer, index, step, cache):
        qkv = self._linear(x, layer.qkv)
        mixed = self.ops.attend(qkv, *cache.layers[index], self.config, step)
        return self._linear(mixed, layer.out)

    def _mlp(self, x, layer):
        activation = self.ops.swiglu if self.config.activation == "swiglu" else self.ops.gelu_tanh
        return self._linear(activation(self._linear(x, layer.up)), layer.down)

    def _linear(self, x, linear):
        if isinstance(linear, Linear):
            return self.ops.linear(x, linear)
        if isinstance(linear, Stacked):
            return torch.cat([self._linear(x, part) for part in linear.parts], -1)
        if isinstance(linear, Float32Linear):
            return self.ops.linear(x.float(), linear.linear).to(linear.output_dtype)
        if isinstance(linear, LazyLinear):
            return self._linear(x, linear.read())
        return self.ops.quantized_linear(x, linear)


class Decoder(LayerArithmetic):
    """All layers, embedding and output matrix.

    Takes weights by canonical name (see models/family.py) in the wanted dtype, 2-D ones packed by
    the backend. A quantised linear layer stands under its name without suffix ("layers.0.qkv"), as
    the backend's `pack_quantized` made it.
    """

    def __init__(self, config: DecoderConfig, weights: dict, ops):
        super().__init__(config, ops)
        self.embedding = weights["embed.weight"]
        self.layers = [layer_of(weights, f"layers.{i}.") for i in range(config.layers)]
        self.final_norm = norm_of(weights, "final_norm")
        self.lm_head = linear_of(weights, "lm_head")

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [T] -> [T, hidden]."""
        return self.ops.embed(ids, self.embedding)

    def angles(self, positions: torch.Tensor):
        """positions int64 [T, channels] -> (cos, sin) [T, head_dim] in the decoder's dtype."""
        cos, sin = rotary_angles(self.config.rope, self.config.head_dim, positions)
        return cos.to(self.embedding.dtype), sin.to(self.embedding.dtype)

    def forward(self, x: torch.Tensor, step: Step, cache) -> torch.Tensor:
        """x [T, hidden] -> normalised hidden states [T, hidden].

        Writes this step's keys and values into `cache`.
        """
        if self.tap is None:
            hidden = self.ops.all_layers(self, x, step, cache)
            return self._all_layers(x, step, cache) if hidden is None else hidden
        hidden = self._all_layers(self.tap("embed", x), step, cache)
        return self.tap("final_norm", hidden)

    def _all_layers(self, residual, step: Step, cache):
        """Layer after layer: each branch's output joins the residual inside the next norm."""
        norms = [layer.attention_norm for layer in self.layers] + [self.final_norm]
        x = self._norm(residual, norms[0])
        for i, layer in enumerate(self.layers):
            x, residual = self._layer(x, residual, layer, i, step, cache, norms[i + 1])
        return x

    def stages(self) -> list[str]:
        """Where `tap` is called, in order."""
        names = ["embed"]
        for i in range(len(self.layers)):
            names += [f"layers.{i}.attention", f"layers.{i}.mlp"]
        return [*names, "final_norm"]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, hidden] -> float32 [T, vocab]."""
        logits = self.ops.gather(self._linear(hidden, self.lm_head))
        return logits[:, : self.config.vocab_size].float()  # the last of a team may have rows more


def linear_of(weights: dict, name: str):
    """The linear layer `name`: as a backend packed it, or made of its float weight and bias."""
    if name in weights:
        return weights[name]
    return Linear(weights[name + ".weight"], weights.get(name + ".bias"))


def norm_of(weights: dict, name: str) -> Norm:
    return Norm(weights[name + ".weight"], weights.get(name + ".bias"))


def layer_of(weights: dict, prefix: str) -> Layer:
    """The layer whose tensors (or packed layers) have names that begin with `prefix`."""
    norms = {name: norm_of(weights, prefix + name) for name in NORMS}
    for name in POST_NORMS:
        if f"{prefix}{name}.weight" in weights:
            norms[name] = norm_of(weights, prefix + name)
    linears = {name: linear_of(weights, prefix + name) for name in LINEARS}
    return Layer(**norms, **linears)
