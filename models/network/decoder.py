"""The language decoder of every family: embedding -> layers -> final norm -> logits, over packed tokens [T, hidden].

All arithmetic goes through an `ops` object (see runtime/ops): the same layers run on plain torch, the fast CPU kernels or
the NPU's. Sequences of different lengths lie one after another in T; `Step` says where each begins and what it may see.
"""

from dataclasses import dataclass

import torch

from models.config import DecoderConfig

from .linear import Late, Linear, Norm, Stacked, Wide
from .rope import rotary_angles


@dataclass
class Step:
    """One forward pass over the packed tokens of B sequences.

    cos, sin [T, head_dim]: rotary row of every token.  slots int64 [T]: cache slot, block * block_size + offset.
    block_table int32 [B, blocks].  q_lens, kv_lens: per sequence, tokens in this step and in the cache after it.
    causal: a token sees itself and what is before it; else all kv_lens tokens (prefix-LM context).
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


class LayerArithmetic:
    """What one layer computes, whatever its linear layers and norms are made of: `ops` knows."""

    def __init__(self, config: DecoderConfig, ops):
        self.config = config
        self.ops = ops

    def layer(self, x, layer: Layer, index: int, step, cache):
        """Residual stream [T, hidden] before the layer -> after it."""
        normed = self._norm(x, layer.attention_norm)
        if self.config.residual_alpha is None:
            normed, x = self.ops.add_rms_norm(
                self.ops.all_reduce(self._attention(normed, layer, index, step, cache)),
                x,
                layer.mlp_norm,
                self.config.eps,
            )
            return x + self.ops.all_reduce(self._mlp(normed, layer))
        alpha = (
            self.config.residual_alpha
        )  # ChatGLM-6B: the residual is the norm's output times alpha
        x = self.ops.scaled_add(
            self.ops.all_reduce(self._attention(normed, layer, index, step, cache)), normed, alpha
        )
        normed = self._norm(x, layer.mlp_norm)
        return self.ops.scaled_add(self.ops.all_reduce(self._mlp(normed, layer)), normed, alpha)

    def _norm(self, x, norm):
        apply = self.ops.layer_norm if self.config.norm == "layer" else self.ops.rms_norm
        return apply(x, norm, self.config.eps)

    def _attention(self, x, layer, index, step, cache):
        mixed = self.ops.attend(self._linear(x, layer.qkv), *cache.layers[index], self.config, step)
        return self._linear(mixed, layer.out)

    def _mlp(self, x, layer):
        activation = self.ops.swiglu if self.config.activation == "swiglu" else self.ops.gelu_tanh
        return self._linear(activation(self._linear(x, layer.up)), layer.down)

    def _linear(self, x, linear):
        if isinstance(linear, Linear):
            return self.ops.linear(x, linear)
        if isinstance(linear, Stacked):
            return torch.cat([self._linear(x, part) for part in linear.parts], -1)
        if isinstance(linear, Wide):
            return self.ops.linear(x.float(), linear.linear).to(linear.out)
        if isinstance(linear, Late):
            return self._linear(x, linear.read())
        return self.ops.quantized_linear(x, linear)


class Decoder(LayerArithmetic):
    """Weights by canonical name (see base.py), already in the wanted dtype; 2-D ones are packed by the backend.

    A quantised linear layer stands under its name without suffix ("layers.0.qkv"), as the backend's `pack_quantized` made it.
    """

    def __init__(self, config: DecoderConfig, weights: dict, ops):
        super().__init__(config, ops)
        self.embedding = weights["embed.weight"]
        self.layers = [layer_of(weights, f"layers.{i}.") for i in range(config.layers)]
        self.final_norm = norm_of(weights, "final_norm")
        self.lm_head = linear_of(weights, "lm_head")
        self.tap = None  # callable(stage, residual stream [T, hidden]) -> the stream to go on with

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """ids int64 [T] -> [T, hidden]."""
        return self.ops.embed(ids, self.embedding)

    def angles(self, positions: torch.Tensor):
        """positions int64 [T, channels] -> (cos, sin) [T, head_dim] in the decoder's dtype."""
        cos, sin = rotary_angles(self.config.rope, self.config.head_dim, positions)
        return cos.to(self.embedding.dtype), sin.to(self.embedding.dtype)

    def forward(self, x: torch.Tensor, step: Step, cache) -> torch.Tensor:
        """x [T, hidden] -> normalised hidden states [T, hidden]; writes this step's keys and values into `cache`."""
        if self.tap is None and (hidden := self.ops.all_layers(self, x, step, cache)) is not None:
            return hidden
        run = self._plain_layers if self.config.residual_alpha is None else self._alpha_layers
        return self._tapped("final_norm", run(self._tapped("embed", x), step, cache))

    def stages(self) -> list[str]:
        """Where `tap` is called, in order."""
        layers = (
            f"layers.{i}.{branch}"
            for i in range(len(self.layers))
            for branch in ("attention", "mlp")
        )
        return ["embed", *layers, "final_norm"]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [T, hidden] -> float32 [T, vocab]."""
        return self.ops.gather(self._linear(hidden, self.lm_head)).float()

    def _plain_layers(self, residual, step, cache):
        """Pre-norm: each branch's output joins the residual inside the next norm."""
        next_norms = [layer.attention_norm for layer in self.layers[1:]] + [self.final_norm]
        x = self._norm(residual, self.layers[0].attention_norm)
        for i, (layer, next_norm) in enumerate(zip(self.layers, next_norms)):
            x, residual = self.ops.add_rms_norm(
                self.ops.all_reduce(self._attention(x, layer, i, step, cache)),
                residual,
                layer.mlp_norm,
                self.config.eps,
            )
            x, residual = self._tapped_norm(f"layers.{i}.attention", x, residual, layer.mlp_norm)
            x, residual = self.ops.add_rms_norm(
                self.ops.all_reduce(self._mlp(x, layer)), residual, next_norm, self.config.eps
            )
            x, residual = self._tapped_norm(f"layers.{i}.mlp", x, residual, next_norm)
        return x

    def _alpha_layers(self, x, step, cache):
        alpha = self.config.residual_alpha
        for i, layer in enumerate(self.layers):
            normed = self._norm(x, layer.attention_norm)
            x = self.ops.scaled_add(
                self.ops.all_reduce(self._attention(normed, layer, i, step, cache)), normed, alpha
            )
            x = self._tapped(f"layers.{i}.attention", x)
            normed = self._norm(x, layer.mlp_norm)
            x = self.ops.scaled_add(self.ops.all_reduce(self._mlp(normed, layer)), normed, alpha)
            x = self._tapped(f"layers.{i}.mlp", x)
        return self._norm(x, self.final_norm)

    def _tapped(self, stage, x):
        return x if self.tap is None else self.tap(stage, x)

    def _tapped_norm(self, stage, x, residual, norm):
        """(normalised stream, stream); what the tap put in place of the stream is normalised anew."""
        if self.tap is None:
            return x, residual
        residual = self.tap(stage, residual)
        return self._norm(residual, norm), residual


def linear_of(weights: dict, name: str):
    return (
        weights[name]
        if name in weights
        else Linear(weights[name + ".weight"], weights.get(name + ".bias"))
    )


def norm_of(weights: dict, name: str) -> Norm:
    return Norm(weights[name + ".weight"], weights.get(name + ".bias"))


def layer_of(weights: dict, prefix: str) -> Layer:
    """The layer whose tensors (or packed layers) have names that begin with `prefix`."""
    norms = ("attention_norm", "mlp_norm")
    linears = ("qkv", "out", "up", "down")
    return Layer(
        **{name: norm_of(weights, prefix + name) for name in norms},
        **{name: linear_of(weights, prefix + name) for name in linears},
    )
