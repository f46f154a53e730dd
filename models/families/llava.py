"""LLaVA-1.5-7B as llava-hf releases it: CLIP ViT-L/14-336 and a projector in front of Vicuna 7B.

Takes config.json, whose gaps are the defaults of transformers' classes, and messages; returns
weight table, vision encoder and prompts. Every `<image>` of a prompt becomes as many tokens as the
image has rows (576).
"""

import functools

import numpy as np
import torch
from torch import nn

from models.checkpoint.table import Weight, dense, one_to_one, pair
from models.config import (
    DecoderConfig,
    VisionSpec,
    check_fields,
    chosen,
    head_size,
    patch_grid,
    rope_of,
)
from models.errors import ModelError
from models.family import SamplingDefaults
from models.network.vision_blocks import (
    Dense,
    Normalize,
    PreNormBlock,
    gelu_erf,
    gelu_tanh,
    quick_gelu,
    with_class_token,
)
from models.prompt.images import CLIP_MEAN, CLIP_STD
from models.prompt.preprocessor import cropped
from models.prompt.special_tokens import special_names
from models.prompt.tokenizers.json_file import JsonTokenizer, MissingTokenizer
from models.prompt.tokenizers.sentencepiece_model import SentencePieceTokenizer
from models.side_files import is_there, read_optional_json

from .templated import TemplatedFamily
from .weight_rows import buffers, decoder_weights, output_matrix, prefix, tower_block, unused

ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu_erf, "gelu_pytorch_tanh": gelu_tanh}
LLAMA = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA_ONLY = {"model_type": "llama", "hidden_act": "silu"}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "layer_norm_eps": 1e-5,
    "num_channels": 3,
}
CLIP_ONLY = {"model_type": "clip_vision_model", "num_channels": 3}
OTHER_PART = (
    "{part} says {{field}} {{given}}, this toolkit runs LLaVA with {{wanted!r}} only; "
    "use llava-hf/llava-1.5-7b-hf"
)
# of a config without vision_config
VIT_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
TEMPLATE = """\
{% for message in messages %}{% if message.role != 'system' %}{{ message.role | upper }}: {% endif %}
{% for part in message.content if part.type == 'image' %}{{ '<image>\n' }}{% endfor %}
{% for part in message.content if part.type == 'text' %}{{ part.text + ' ' }}{% endfor %}
{% endfor %}{{ 'ASSISTANT:' }}"""


class ClipTower(nn.Module):
    """NHWC image [B, S, S, 3], raw 0..255 -> hidden states [B, 1 + patches, width].

    Those after `layers` blocks; the class token is first. CLIP's last norm is not applied.
    """

    def __init__(self, clip: dict, layers: int):
        super().__init__()
        width = clip["hidden_size"]
        patch = clip["patch_size"]
        eps = clip["layer_norm_eps"]
        self.normalize = Normalize(CLIP_MEAN, CLIP_STD)
        self.patch = nn.Conv2d(3, width, patch, patch, bias=False)
        self.cls = nn.Parameter(torch.empty(width))
        self.position = nn.Parameter(torch.empty(1 + (clip["image_size"] // patch) ** 2, width))
        self.pre_norm = nn.LayerNorm(width, eps=eps)
        block = (
            width,
            clip["num_attention_heads"],
            clip["intermediate_size"],
            eps,
            chosen(ACTIVATIONS, clip, "hidden_act", "quick_gelu"),
        )
        self.blocks = nn.ModuleList(PreNormBlock(*block) for _ in range(layers))

    def forward(self, nhwc):
        x = self.patch(self.normalize(nhwc)).flatten(2).transpose(1, 2)
        x = with_class_token(x, self.cls) + self.position
        x = self.pre_norm(x)
        for block in self.blocks:
            x = block(x)
        return x


class VisionEncoder(nn.Module):
    """NHWC image [B, S, S, 3], raw 0..255 -> feature rows [B, patches, hidden].

    `layers` blocks of the tower run; `whole` keeps the class token's row.
    """

    def __init__(self, clip: dict, layers: int, hidden: int, activation, bias: bool, whole: bool):
        super().__init__()
        self.tower = ClipTower(clip, layers)
        self.first = int(not whole)
        self.activation = activation
        self.linear_1 = Dense(clip["hidden_size"], hidden, bias)
        self.linear_2 = Dense(hidden, hidden, bias)

    def forward(self, nhwc):
        features = self.tower(nhwc)[:, self.first :]
        return self.linear_2(self.activation(self.linear_1(features)))


class Llava(TemplatedFamily):
    """One wording serves every language: the model answers in the language of the question."""

    name = "llava-1.5"
    default_template = TEMPLATE
    stop_tokens = ("</s>",)

    @classmethod
    def matches(cls, config):
        if config.get("model_type") == "llava":
            return "config.json has model_type llava"

    def __init__(self, directory, config):
        super().__init__(directory, config)
        if "mm_vision_tower" in config:
            raise ModelError(
                f"{directory} holds LLaVA in its authors' own layout, without the vision tower; "
                "download llava-hf/llava-1.5-7b-hf"
            )
        self.text = LLAMA | (config.get("text_config") or {})
        self.clip = CLIP | (config.get("vision_config") or VIT_L_336)
        check_fields(self.text, LLAMA_ONLY, OTHER_PART.format(part="text_config"))
        check_fields(self.clip, CLIP_ONLY, OTHER_PART.format(part="vision_config"))
        self.decoder = _decoder(self.text)
        self.layers = self._feature_layers()
        self.whole = self._keeps_class_token()
        side = self.clip["image_size"]
        rows = patch_grid(side, self.clip["patch_size"]) ** 2 + self.whole
        self.vision = VisionSpec((1, side, side, 3), (1, rows, self.decoder.hidden))
        image_token = config.get("image_token_index", config.get("image_token_id", 32000))
        self.placeholder = ("<image>", image_token)
        self.pictures = cropped(side)

    def vision_encoder(self):
        activation = chosen(ACTIVATIONS, self.config, "projector_hidden_act", "gelu")
        return VisionEncoder(
            self.clip,
            self.layers,
            self.decoder.hidden,
            activation,
            self._projector_bias,
            self.whole,
        )

    @functools.cached_property
    def tokenizer(self):
        json = self.directory / "tokenizer.json"
        model = self.directory / "tokenizer.model"
        image_mark = self.placeholder[0]
        if is_there(json):
            return JsonTokenizer(json, prefixed=True, special=(image_mark,))
        if not is_there(model):
            return MissingTokenizer(json)
        settings = read_optional_json(self.directory / "tokenizer_config.json")
        bos = special_names(self.directory).get("bos_token", "<s>")
        return SentencePieceTokenizer(
            model,
            bos if settings.get("add_bos_token", True) else None,
            settings.get("legacy", False),
            {image_mark: self.placeholder[1]},
        )

    def text_ids(self, text, special=True):
        ids = self.tokenizer.encode(text)
        return ids if special else ids[1:]  # without <s>

    def release_sampling(self, with_image):
        return SamplingDefaults(max_length=self.decoder.max_length, temperature=0.0)

    def check_image_count(self, images):
        """Any number of images is accepted; they stand in the order of the prompt."""

    def image_mark(self):
        """One mark, which `_expand` repeats, in a line of its own as in the release's template."""
        return self.placeholder[0] + "\n"

    def _expand(self, ids, pixels):
        times = np.where(ids == self.placeholder[1], self.vision.rows, 1)
        return np.repeat(ids, times)

    def _config_eos(self):
        return self.config.get("eos_token_id", self.text["eos_token_id"])

    @property
    def _projector_bias(self) -> bool:
        return self.config.get("multimodal_projector_bias", True)

    def _feature_layers(self) -> int:
        """How many blocks run; vision_feature_layer counts hidden states, one more than blocks."""
        layer = self.config.get("vision_feature_layer", -2)
        blocks = self.clip["num_hidden_layers"]
        if not isinstance(layer, int) or not -blocks - 1 <= layer <= blocks:
            raise ModelError(
                f"config.json says vision_feature_layer {layer}, this toolkit takes one number from "
                f"{-blocks - 1} to {blocks}; use the released config.json"
            )
        return layer if layer >= 0 else blocks + 1 + layer

    def _keeps_class_token(self) -> bool:
        return chosen(
            {"default": False, "full": True},
            self.config,
            "vision_feature_select_strategy",
            "default",
        )

    # weights

    def weights(self) -> list[Weight]:
        names = self.shapes
        root = prefix(names, "embed_tokens.weight", "language_model.model.")
        tied = self.config.get("tie_word_embeddings") or self.text.get("tie_word_embeddings")
        head = output_matrix(names, "language_model.", tied)
        bias = self.text.get("attention_bias", False)
        tower = prefix(names, "embeddings.class_embedding", "vision_tower.vision_model.")
        projector = prefix(names, "linear_1.weight", "multi_modal_projector.")
        return [
            *decoder_weights(
                self.decoder,
                root,
                head,
                qkv_bias=bias,
                out_bias=bias,
                mlp_bias=self.text.get("mlp_bias", False),
            ),
            *self._tower_weights(tower),
            *self._projector_weights(projector),
            *buffers(names),
        ]

    def _tower_weights(self, root):
        width = self.clip["hidden_size"]
        inner = self.clip["intermediate_size"]
        patch = self.clip["patch_size"]
        positions = 1 + (self.clip["image_size"] // patch) ** 2
        ours = "vision.tower."
        embeddings = root + "embeddings."
        yield one_to_one(embeddings + "class_embedding", (width,), ours + "cls")
        yield from pair(
            embeddings + "patch_embedding", (width, 3, patch, patch), ours + "patch", bias=False
        )
        yield one_to_one(
            embeddings + "position_embedding.weight", (positions, width), ours + "position"
        )
        # `pre_layrnorm` is the release's spelling
        yield from pair(root + "pre_layrnorm", (width,), ours + "pre_norm")
        for i in range(self.clip["num_hidden_layers"]):
            block = tower_block(f"{root}encoder.layers.{i}.", width, inner, f"{ours}blocks.{i}.")
            yield from block if i < self.layers else unused(block)
        yield from unused(pair(root + "post_layernorm", (width,), ""))

    def _projector_weights(self, root):
        width = self.clip["hidden_size"]
        hidden = self.decoder.hidden
        bias = self._projector_bias
        yield from dense(root + "linear_1", hidden, width, "vision.linear_1", bias)
        yield from dense(root + "linear_2", hidden, hidden, "vision.linear_2", bias)


def _decoder(text: dict) -> DecoderConfig:
    heads = text["num_attention_heads"]
    hidden = text["hidden_size"]
    head_dim = text.get("head_dim") or head_size(hidden, heads)
    return DecoderConfig(
        vocab_size=text["vocab_size"],
        hidden=hidden,
        layers=text["num_hidden_layers"],
        heads=heads,
        kv_heads=text.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        ffn=text["intermediate_size"],
        rope=rope_of(text, head_dim),
        eps=text["rms_norm_eps"],
        max_length=text["max_position_embeddings"],
    )
