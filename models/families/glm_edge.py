"""GLM-Edge-1.5B/4B-chat and GLM-Edge-V-2B/5B: a small GLM decoder; V has a SigLIP tower before it.

Takes config.json and messages; returns weight table, vision encoder and prompts. The chat template
of a V model itself writes one `<|begin_of_image|>` per image row (578).
"""

import functools
import math
from dataclasses import replace

import torch
from torch import nn

from models.checkpoint.table import Weight, one_to_one, pair
from models.config import (
    DecoderConfig,
    VisionSpec,
    check_fields,
    chosen,
    head_size,
    patch_grid,
    rope_of,
)
from models.family import SamplingDefaults
from models.network.rope import interleaved_order
from models.network.vision_blocks import GluAdapter, Normalize, PreNormBlock, gelu_erf, gelu_tanh
from models.prompt.images import one_by_one
from models.prompt.preprocessor import padded
from models.prompt.tokenizers.json_file import JsonTokenizer, MissingTokenizer
from models.side_files import is_there

from .templated import TemplatedFamily
from .weight_rows import (
    buffers,
    decoder_weights,
    glu_adapter_weights,
    output_matrix,
    prefix,
    tower_block,
    unused,
)

MEAN = STD = (0.5, 0.5, 0.5)
ACTIVATIONS = {"gelu_pytorch_tanh": gelu_tanh, "gelu": gelu_erf}
OTHER_ACTIVATION = (
    "config.json says {field} {given}, GLM-Edge has {wanted!r}; use the released config.json"
)
SIGLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
CHAT = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}<|assistant|>"
CHAT_V = """\
{% for m in messages if m.role != 'system' %}{{ '<|' + m.role + '|>\n' }}{% for part in m.content %}
{{ '<|begin_of_image|>' * rows if part.type == 'image' else part.text }}{% endfor %}
{% endfor %}{{ '<|assistant|>\n' }}"""


class SiglipTower(nn.Module):
    """NHWC image [B, S, S, 3], raw 0..255 -> [B, width, grid, grid], after the last norm."""

    def __init__(self, siglip: dict):
        super().__init__()
        width = siglip["hidden_size"]
        patch = siglip["patch_size"]
        eps = siglip["layer_norm_eps"]
        self.grid = siglip["image_size"] // patch
        self.normalize = Normalize(MEAN, STD)
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.position = nn.Parameter(torch.empty(self.grid**2, width))
        block = (
            width,
            siglip["num_attention_heads"],
            siglip["intermediate_size"],
            eps,
            chosen(ACTIVATIONS, siglip, "hidden_act", "gelu_pytorch_tanh"),
        )
        self.blocks = nn.ModuleList(
            PreNormBlock(*block) for _ in range(siglip["num_hidden_layers"])
        )
        self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, nhwc):
        x = self.patch(self.normalize(nhwc)).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x).transpose(1, 2).unflatten(2, (self.grid, self.grid))


class VisionEncoder(nn.Module):
    """NHWC image [B, S, S, 3], raw 0..255 -> feature rows [B, 1 + patches / 4 + 1, hidden].

    The begin and end marks' rows are learned here: they are not the word embeddings.
    """

    def __init__(self, siglip: dict, hidden: int, inner: int):
        super().__init__()
        self.tower = SiglipTower(siglip)
        self.adapter = GluAdapter(siglip["hidden_size"], hidden, inner)

    def forward(self, nhwc):
        return self.adapter(self.tower(nhwc))


class GlmEdge(TemplatedFamily):
    """Chat and V models share config class and names; a vision_config makes the difference.

    One prompt wording serves every language; the model answers in the language of the question.
    """

    name = "glm-edge"
    stop_tokens = ("<|endoftext|>", "<|user|>", "<|observation|>")

    @classmethod
    def matches(cls, config):
        if config.get("model_type") == "glm" and "vision_config" in config:
            return "config.json has model_type glm and a vision_config"
        if config.get("model_type") == "glm" and not config.get("attention_bias", True):
            return "config.json has model_type glm without biases on q, k and v"

    def __init__(self, directory, config):
        super().__init__(directory, config)
        check_fields(config, {"hidden_act": "silu"}, OTHER_ACTIVATION)
        self.decoder = _decoder(config)
        self.default_template = CHAT
        if "vision_config" in config:
            self._add_vision()

    def _add_vision(self):
        self.name = "glm-edge-v"
        self.default_template = CHAT_V
        self.siglip = SIGLIP | self.config["vision_config"]
        side = self.siglip["image_size"]
        grid = patch_grid(side, self.siglip["patch_size"], least=2)
        rows = (grid // 2) ** 2 + 2
        self.vision = VisionSpec((1, side, side, 3), (1, rows, self.decoder.hidden))
        self.placeholder = ("<|begin_of_image|>", self.config["boi_token_id"])
        self.pictures = padded(side)

    def vision_encoder(self):
        return VisionEncoder(self.siglip, self.decoder.hidden, self.decoder.ffn)

    @functools.cached_property
    def tokenizer(self):
        file = self.directory / "tokenizer.json"
        return JsonTokenizer(file) if is_there(file) else MissingTokenizer(file)

    def release_sampling(self, with_image):
        return SamplingDefaults(
            max_length=self.decoder.max_length, temperature=0.6, top_p=0.8, repetition_penalty=1.2
        )

    def clean(self, answer):
        """The chat models begin an answer with a line break."""
        return answer.strip()

    def prompt_from_ids(self, ids, pixels=None, image_starts=None):
        """As in TemplatedFamily; the all-zero image that the release adds to a text is left out."""
        images = one_by_one(pixels)
        return super().prompt_from_ids(ids, images if images.any() else None, image_starts)

    # weights

    def weights(self) -> list[Weight]:
        names = self.shapes
        d = self.decoder
        root = prefix(names, "embed_tokens.weight", "model.")
        head = output_matrix(names, "", self.config.get("tie_word_embeddings"))
        rows = decoder_weights(
            d,
            root,
            head,
            interleaved_order(d.head_dim, d.rope.dim),
            qkv_bias=self.config.get("attention_bias", True),
            fused_mlp=True,
        )
        return [*rows, *(self._vision_weights() if self.vision else ()), *buffers(names)]

    def _vision_weights(self):
        names = self.shapes
        tower = self.siglip
        width = tower["hidden_size"]
        inner = tower["intermediate_size"]
        patch = tower["patch_size"]
        root = prefix(
            names, "embeddings.patch_embedding.weight", "model.vision.vit.model.vision_model."
        )
        yield from pair(
            root + "embeddings.patch_embedding", (width, 3, patch, patch), "vision.tower.patch"
        )
        yield one_to_one(
            root + "embeddings.position_embedding.weight",
            ((tower["image_size"] // patch) ** 2, width),
            "vision.tower.position",
        )
        for i in range(tower["num_hidden_layers"]):
            yield from tower_block(
                f"{root}encoder.layers.{i}.", width, inner, f"vision.tower.blocks.{i}."
            )
        yield from pair(root + "post_layernorm", (width,), "vision.tower.norm")
        yield from unused(_pooling_head(root + "head.", width, inner))
        root = prefix(names, "conv.weight", "model.vision.adapter.")
        for row in glu_adapter_weights(
            root, "vision.adapter.", width, self.decoder.hidden, self.decoder.ffn
        ):
            yield _reshaped(row, names.get(row.source, row.shape))


def _decoder(config: dict) -> DecoderConfig:
    head_dim = config.get("head_dim")
    head_dim = head_dim or head_size(config["hidden_size"], config["num_attention_heads"])
    return DecoderConfig(
        vocab_size=config["vocab_size"],
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=head_dim,
        ffn=config["intermediate_size"],
        rope=rope_of(config, head_dim, factor=0.5),
        eps=config["rms_norm_eps"],
        max_length=config["max_position_embeddings"],
    )


def _pooling_head(root: str, width: int, inner: int):
    """SigLIP's attention pooling, which GLM-Edge-V carries and never uses."""
    yield Weight(root + "probe", (1, 1, width))
    yield Weight(root + "attention.in_proj_weight", (3 * width, width))
    yield Weight(root + "attention.in_proj_bias", (3 * width,))
    yield from pair(root + "attention.out_proj", (width, width), "")
    yield from pair(root + "layernorm", (width,), "")
    yield from pair(root + "mlp.fc1", (inner, width), "")
    yield from pair(root + "mlp.fc2", (width, inner), "")


def _reshaped(row: Weight, shape: tuple[int, ...]) -> Weight:
    """The row as stored in `shape`: the begin and end marks may have fewer axes."""
    if shape == row.shape or len(row.shape) != 3 or math.prod(shape) != math.prod(row.shape):
        return row
    (part,) = row.parts
    part = replace(part, transform=lambda stored: stored.reshape(row.shape))
    return replace(row, shape=shape, parts=(part,))
