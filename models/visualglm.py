"""VisualGLM-6B: EVA-ViT-g + Q-Former + projection in front of ChatGLM-6B (first generation)."""
import torch
from torch import nn

from .image import CLIP_MEAN, CLIP_STD
from .vision import Attention, Dense, Mlp, Normalize, PreNormBlock

LN_VISION_EPS = 1e-5        # a plain nn.LayerNorm in the release, not the tower's 1e-6


class Vit(nn.Module):
    """EVA-ViT: NHWC picture [B, S, S, 3], raw 0..255 -> [B, 1 + patches, width], class token first."""

    def __init__(self, eva: dict):
        super().__init__()
        width, patch = eva["hidden_size"], eva["patch_size"]
        patches = (eva["image_size"][0] // patch) * (eva["image_size"][1] // patch)
        self.normalize = Normalize(CLIP_MEAN, CLIP_STD)
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.empty(1, width))
        self.position = nn.Parameter(torch.empty(1 + patches, width))
        block = (width, eva["num_attention_heads"], eva["inner_hidden_size"], eva["layernorm_epsilon"])
        self.blocks = nn.ModuleList(PreNormBlock(*block) for _ in range(eva["num_layers"]))
        self.norm = nn.LayerNorm(width, eps=LN_VISION_EPS)

    def forward(self, nhwc):
        x = self.patch(self.normalize(nhwc)).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], 1, -1), x), dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class QFormerLayer(nn.Module):
    """Post-norm BERT layer whose residuals are the *normalised* values; cross-attention in some layers only."""

    def __init__(self, width, heads, inner, context_width, cross: bool, eps: float):
        super().__init__()
        self.input_norm, self.attention = nn.LayerNorm(width, eps=eps), Attention(width, heads)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.cross = Attention(width, heads, context_width) if cross else None
        self.cross_norm = nn.LayerNorm(width, eps=eps) if cross else None
        self.mlp = Mlp(width, inner)

    def forward(self, h, context):
        x = self.input_norm(h)
        x = self.attention_norm(x + self.attention(x))
        if self.cross is not None:
            x = self.cross_norm(x + self.cross(x, context))
        return x + self.mlp(x)


class QFormer(nn.Module):
    """Learned queries look at the tower's tokens [B, T, context] -> [B, queries, width]."""

    def __init__(self, config: dict):
        super().__init__()
        width, eps = config["hidden_size"], config["layernorm_epsilon"]
        self.queries = nn.Parameter(torch.empty(config["vocab_size"], width))
        self.layers = nn.ModuleList(
            QFormerLayer(width, config["num_attention_heads"], config.get("inner_hidden_size") or 4 * width,
                         config["cross_attn_hidden_size"], cross, eps)
            for cross in config["is_decoder"])
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, context):
        h = self.queries.expand(context.shape[0], -1, -1)
        for layer in self.layers:
            h = layer(h, context)
        return self.norm(h)


class VisionEncoder(nn.Module):
    """NHWC picture [B, S, S, 3], raw 0..255 -> rows to splice [B, queries, decoder hidden]."""

    def __init__(self, config: dict):
        super().__init__()
        self.vit, self.qformer = Vit(config["eva_config"]), QFormer(config["qformer_config"])
        self.project = Dense(config["qformer_config"]["hidden_size"], config["hidden_size"])

    def forward(self, nhwc):
        return self.project(self.qformer(self.vit(nhwc)))
