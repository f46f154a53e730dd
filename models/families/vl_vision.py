"""Pictures of GLM-OCR, GLM-4.1V and GLM-4.6V-Flash: of any size, several in a prompt.

Takes config.json and pictures, returns the settings and table rows of their tower, Patches, and
prompts with as many places for each picture as it has rows. A family fills in `tower_config`.
"""

import functools
from collections.abc import Iterator

import numpy as np

from models.checkpoint import Checkpoint
from models.checkpoint.table import Part, Weight, dense, fused_dense, one_to_one, pair
from models.config import FRAMES, MERGE, PATCH, PATCH_VALUES, PatchSpec, check_fields
from models.errors import ModelError
from models.family import Prompt, id_array
from models.network.patch_geometry import position_rows, rotary_rows, segment_rows
from models.network.patch_tower import PatchTower, PatchTowerConfig
from models.prompt.images import open_image
from models.prompt.patch_settings import patch_rules
from models.prompt.patches import Patches, cut, given_patches
from models.prompt.tokenizers.json_file import JsonTokenizer, MissingTokenizer
from models.side_files import is_there

from .templated import TemplatedFamily
from .vl_text import NOT_RELEASED, picture_layout, text_decoder, text_fields, text_rows

ROOT = "model.visual."
POSITIONS = ROOT + "embeddings.position_embedding.weight"
IMAGE = "<|image|>"
IMAGE_MARK = f"<|begin_of_image|>{IMAGE}<|end_of_image|>"
TOWER_FIELDS = {
    "hidden_act": "silu",
    "in_channels": 3,
    "patch_size": PATCH,
    "spatial_merge_size": MERGE,
    "temporal_patch_size": 2,
}


class PatchedFamily(TemplatedFamily):
    """Base of the three families. Their layers, positions and pictures are the same; the towers
    differ in what `tower_config` says."""

    stop_tokens = ("<|endoftext|>", "<|user|>")
    qkv_bias: bool  # of the decoder's layers

    def __init__(self, directory, config):
        super().__init__(directory, config)
        self.text = text_fields(config)
        self.decoder = text_decoder(self.text)
        tower = config["vision_config"]
        check_fields(tower, TOWER_FIELDS, NOT_RELEASED)
        self.tower = self.tower_config(tower)
        if self.tower.out != self.decoder.hidden:
            raise ModelError(
                f"config.json gives pictures {self.tower.out} values a row and the decoder "
                f"{self.decoder.hidden}; take config.json from the release"
            )
        widths = {"patches": PATCH_VALUES, "angles": self.tower.head_dim, "segments": 1}
        if self.tower.positions:
            widths["positions"] = self.tower.width
        self.vision = PatchSpec(widths, self.decoder.hidden)
        self.placeholder = (IMAGE, config["image_token_id"])
        self.patch_rules = patch_rules(self.directory, self.name)

    def tower_config(self, tower: dict) -> PatchTowerConfig:
        """Settings of the tower whose vision_config is `tower`."""
        raise NotImplementedError

    def vision_encoder(self):
        return PatchTower(self.tower)

    def encoder_inputs(self, pictures: list[Patches]) -> dict[str, np.ndarray]:
        """The encoder's inputs for these pictures, one behind the other: float32 [N, width] each."""
        grids = [picture.grid for picture in pictures]
        angles = [rotary_rows(grid, self.tower.head_dim) for grid in grids]
        inputs = {
            "patches": np.concatenate([picture.rows for picture in pictures]),
            "angles": np.concatenate(angles),
            "segments": segment_rows([len(picture.rows) for picture in pictures]),
        }
        if self.tower.positions:
            maps = [position_rows(self.position_map, grid) for grid in grids]
            inputs["positions"] = np.concatenate(maps)
        return inputs

    @functools.cached_property
    def position_map(self) -> np.ndarray:
        """float32 [S * S, width]; read when the first picture comes."""
        return Checkpoint(self.directory).tensor(POSITIONS).float().numpy()

    @functools.cached_property
    def tokenizer(self):
        file = self.directory / "tokenizer.json"
        return JsonTokenizer(file) if is_there(file) else MissingTokenizer(file)

    # images and prompt

    def check_image_count(self, images: int):
        """Any number, of any sizes."""

    def pixels(self, source) -> Patches:
        """Path, bytes, PIL image, or the release's {"pixel_values", "grid_thw"}, or the result
        itself -> Patches."""
        if isinstance(source, Patches):
            return source
        if isinstance(source, dict):
            return given_patches(source)
        return cut(open_image(source), self.patch_rules)

    def rows_of_image(self):
        return 1  # for the template: `_expand` makes them as many as there are

    def rows_of(self, picture: Patches) -> int:
        return picture.num_tokens

    def image_mark(self):
        return IMAGE_MARK

    def prompt_from_ids(self, ids, pixels=None, image_starts=None) -> Prompt:
        """Token ids with a placeholder for every row of a picture -> Prompt.

        pixels: a dict {"pixel_values": float [N, 1176], "grid_thw": [1, rows, columns]} for each
        picture, in order; where they stand follows from the ids.
        """
        ids = id_array(ids)
        pictures = [self.pixels(picture) for picture in pixels or ()]
        return self._prompt(ids, pictures, image_starts)

    def _expand(self, ids, pixels):
        """One placeholder a picture -> as many as it has rows."""
        places = np.flatnonzero(ids == self.placeholder[1])
        if len(places) != len(pixels):
            raise ModelError(
                f"the chat template has {len(places)} places for {len(pixels)} pictures; use the "
                "release's chat_template"
            )
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[places] = [picture.num_tokens for picture in pixels]
        return np.repeat(ids, repeats)

    def _prompt(self, ids, pixels, image_starts=None, text="") -> Prompt:
        grids = [(picture.grid[0] // MERGE, picture.grid[1] // MERGE) for picture in pixels]
        layout = picture_layout(ids, self.placeholder[1], grids)
        if image_starts is not None and tuple(image_starts) != layout.image_starts:
            raise ModelError(
                f"image_starts are {list(image_starts)}, the places in the ids begin at "
                f"{list(layout.image_starts)}; leave image_starts out"
            )
        return Prompt(ids, pixels, layout, text)

    def _config_eos(self):
        return self.text.get("eos_token_id")

    # weights

    def weights(self) -> list[Weight]:
        text = text_rows(self.decoder, self.shapes, self.qkv_bias)
        return [*text, *tower_rows(self.tower)]


def tower_rows(tower: PatchTowerConfig) -> Iterator[Weight]:
    """Table rows of the tower. The position map is dropped: it is sampled outside the graph."""
    width = tower.width
    yield from _matrix(
        ROOT + "patch_embed.proj", (width, 3, FRAMES, PATCH, PATCH), "vision.embed", _row_by_row
    )
    if tower.positions:
        yield Weight(POSITIONS, (tower.positions**2, width))
        yield _norm(ROOT + "post_conv_layernorm", width, "vision.embed_norm")
    for index in range(tower.layers):
        yield from _block_rows(tower, f"{ROOT}blocks.{index}.", f"vision.blocks.{index}.")
    yield _norm(ROOT + "post_layernorm", width, "vision.norm")
    out = tower.out
    merger = "vision.merger."
    yield from _matrix(
        ROOT + "downsample", (out, width, MERGE, MERGE), merger + "downsample", _block_by_block
    )
    yield from dense(ROOT + "merger.proj", out, out, merger + "project", bias=False)
    yield from pair(ROOT + "merger.post_projection_norm", (out,), merger + "norm")
    yield from _mlp_rows(ROOT + "merger.", out, tower.merged, merger + "mlp.", bias=False)


def _block_rows(tower: PatchTowerConfig, source: str, target: str) -> Iterator[Weight]:
    width = tower.width
    attention = target + "attention."
    yield _norm(source + "norm1", width, target + "attention_norm")
    yield from fused_dense(source + "attn.qkv", width, width, attention, "qkv", tower.bias)
    yield from dense(source + "attn.proj", width, width, attention + "out", tower.bias)
    if tower.qk_norm:
        yield _norm(source + "attn.q_norm", tower.head_dim, attention + "q_norm")
        yield _norm(source + "attn.k_norm", tower.head_dim, attention + "k_norm")
    yield _norm(source + "norm2", width, target + "mlp_norm")
    yield from _mlp_rows(source + "mlp.", width, tower.inner, target + "mlp.", tower.bias)


def _mlp_rows(source: str, width: int, inner: int, target: str, bias: bool) -> Iterator[Weight]:
    yield from dense(source + "gate_proj", inner, width, target + "gate", bias)
    yield from dense(source + "up_proj", inner, width, target + "up", bias)
    yield from dense(source + "down_proj", width, inner, target + "down", bias)


def _norm(source: str, width: int, target: str) -> Weight:
    return one_to_one(source + ".weight", (width,), target + ".weight")


def _matrix(source: str, shape: tuple[int, ...], target: str, transform) -> Iterator[Weight]:
    """A convolution whose windows do not overlap is a product with its window as a row."""
    yield Weight(source + ".weight", shape, (Part(target + ".weight", transform=transform),))
    yield one_to_one(source + ".bias", shape[:1], target + ".bias")


def _row_by_row(weight):
    """[out, channel, frame, y, x] -> [channel * frame * y * x, out]"""
    return weight.flatten(1).t()


def _block_by_block(weight):
    """[out, in, row, column] -> [row * column * in, out]: the patches of a block side by side."""
    return weight.permute(2, 3, 1, 0).flatten(0, 2)
