"""GLM-4V-9B: an EVA2-CLIP tower and a gated projector in front of GLM-4.

Takes an image squashed to S x S, returns feature rows [boi; patches; eoi]: its three prompt tokens.
"""

import numpy as np
import torch
from torch import nn

from models.checkpoint.table import Weight, dense, fused_dense, one_to_one, pair
from models.config import VisionSpec, check_fields, patch_grid
from models.errors import ModelError
from models.family import Layout, Prompt, id_array
from models.network.vision_blocks import Attention, GluAdapter, Mlp, Normalize, with_class_token
from models.prompt.images import CLIP_MEAN, CLIP_STD
from models.prompt.preprocessor import squashed

from .glm4 import NOT_RELEASED, Glm4, is_chatglm, released_pieces
from .weight_rows import glu_adapter_weights


class PostNormBlock(nn.Module):
    """x += norm(attention(x)); x += norm(mlp(x))."""

    def __init__(self, width: int, heads: int, inner: int, eps: float):
        super().__init__()
        self.attention = Attention(width, heads)
        self.attention_norm = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, inner)
        self.mlp_norm = nn.LayerNorm(width, eps=eps)

    def forward(self, x):
        x = x + self.attention_norm(self.attention(x))
        return x + self.mlp_norm(self.mlp(x))


class Tower(nn.Module):
    """NHWC image [B, S, S, 3], raw 0..255 -> [B, width, grid, grid].

    There is no norm before or after the blocks.
    """

    def __init__(self, config: dict):
        super().__init__()
        width = config["hidden_size"]
        patch = config["patch_size"]
        self.grid = config["image_size"] // patch
        self.normalize = Normalize(CLIP_MEAN, CLIP_STD)
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.empty(1, width))
        self.position = nn.Parameter(torch.empty(config["num_positions"], width))
        block = (width, config["num_heads"], config["intermediate_size"], config["layer_norm_eps"])
        self.blocks = nn.ModuleList(
            PostNormBlock(*block) for _ in range(config["num_hidden_layers"])
        )

    def forward(self, nhwc):
        x = self.patch(self.normalize(nhwc)).flatten(2).transpose(1, 2)
        x = with_class_token(x, self.cls) + self.position
        for block in self.blocks:
            x = block(x)
        return x[:, 1:].transpose(1, 2).unflatten(2, (self.grid, self.grid))


class VisionEncoder(nn.Module):
    """NHWC image [B, S, S, 3], raw 0..255 -> feature rows [B, 1 + patches / 4 + 1, hidden].

    The begin and end marks' rows are learned here; all are divided by the release's scaling factor.
    """

    def __init__(self, config: dict, hidden: int, inner: int):
        super().__init__()
        self.tower = Tower(config)
        self.adapter = GluAdapter(config["hidden_size"], hidden, inner)
        self.scaling = float(config["scaling_factor"])

    def forward(self, nhwc):
        return self.adapter(self.tower(nhwc)) / self.scaling


class Glm4V(Glm4):
    name = "glm-4v"
    takes_tools = False
    upright = False  # the release ignores the tag

    @classmethod
    def matches(cls, config):
        if is_chatglm(config) and "vision_config" in config:
            return "config.json has model_type chatglm, multi_query_group_num and a vision_config"

    def __init__(self, directory, config):
        super().__init__(directory, config)
        tower = config["vision_config"]
        check_fields(tower, {"hidden_act": "gelu", "in_channels": 3}, NOT_RELEASED)
        side = tower["image_size"]
        grid = patch_grid(side, tower["patch_size"], least=2)
        if tower["num_positions"] != grid * grid + 1:
            raise ModelError(
                f"vision_config has num_positions {tower['num_positions']}, but a picture of "
                f"{side} pixels has {grid * grid} patches and one class token; "
                "take config.json from the release"
            )
        self.vision = VisionSpec(
            (1, side, side, 3), (1, (grid // 2) ** 2 + 2, config["hidden_size"])
        )
        self.pictures = squashed(side)

    def vision_encoder(self):
        return VisionEncoder(self.config["vision_config"], self.decoder.hidden, self.decoder.ffn)

    # images and prompt

    def _content(self, message):
        """Takes the release's own form too: {"role": "user", "image": image, "content": text}."""
        images, text = super()._content(message)
        if message.get("image") is not None:
            images = [message["image"], *images]
        return images, text

    def _pieces(self, messages, tools):
        """As the release words it: no template of a directory knows where the images stand."""
        return released_pieces(messages, tools)

    def _prompt(self, ids, pixels, image_starts=None, text="") -> Prompt:
        """The image's three ids (begin, placeholder, end) become as many as it has rows."""
        if not pixels:
            layout = Layout(np.arange(len(ids))[:, None], (len(ids),), (1,))
            return Prompt(ids, [], layout, text)
        start = self._image_start(ids, image_starts)
        patches = self.vision.rows - 2
        placeholder = start + 1
        rows = np.full(patches, ids[placeholder])
        ids = np.concatenate((ids[:placeholder], rows, ids[placeholder + 1 :]))
        return Prompt(ids, pixels, expanded_layout(len(ids), start, patches), text)

    def _image_start(self, ids, image_starts) -> int:
        """Index of the begin mark; the end mark must stand two places behind it."""
        marks = (self.config["boi_token_id"], self.config["eoi_token_id"])
        if image_starts is None:
            starts = np.flatnonzero(ids == marks[0])
        else:
            starts = id_array(image_starts, "image_starts")
        if len(starts) != 1 or tuple(ids[starts[0] : starts[0] + 3 : 2]) != marks:
            raise ModelError(
                f"the prompt has one picture, so its ids must hold {marks[0]}, one placeholder, "
                f"{marks[1]} once; build it with Engine.prompt, or pass ids of the release's tokenizer"
            )
        return int(starts[0])

    # weights

    def weights(self) -> list[Weight]:
        return [*super().weights(), *self._vision_weights()]

    def _vision_weights(self):
        root = "transformer.vision."
        tower = self.config["vision_config"]
        d = self.decoder
        width = tower["hidden_size"]
        inner = tower["intermediate_size"]
        patch = tower["patch_size"]
        embedding = root + "patch_embedding."
        yield one_to_one(embedding + "cls_embedding", (1, width), "vision.tower.cls")
        yield from pair(embedding + "proj", (width, 3, patch, patch), "vision.tower.patch")
        yield one_to_one(
            embedding + "position_embedding.weight",
            (tower["num_positions"], width),
            "vision.tower.position",
        )
        for i in range(tower["num_hidden_layers"]):
            layer = f"{root}transformer.layers.{i}."
            ours = f"vision.tower.blocks.{i}."
            yield from pair(layer + "input_layernorm", (width,), ours + "attention_norm")
            qkv = layer + "attention.query_key_value"
            yield from fused_dense(qkv, width, width, ours + "attention.", "qkv")
            yield from dense(layer + "attention.dense", width, width, ours + "attention.out")
            yield from dense(layer + "mlp.fc1", inner, width, ours + "mlp.up")
            yield from dense(layer + "mlp.fc2", width, inner, ours + "mlp.down")
            yield from pair(layer + "post_attention_layernorm", (width,), ours + "mlp_norm")
        yield from glu_adapter_weights(root, "vision.adapter.", width, d.hidden, d.ffn)


def expanded_layout(length: int, start: int, patches: int) -> Layout:
    """All patch rows share one position: the text after the image counts on as after one token."""
    place = np.arange(length)
    first = start + 1  # of the patch rows
    behind = np.maximum(place - patches + 1, first)
    positions = np.where(place < first, place, behind)
    return Layout(positions[:, None], (length - patches + 1,), (1,), image_starts=(start,))
