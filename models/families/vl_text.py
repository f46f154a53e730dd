"""The language part that GLM-OCR, GLM-4.1V and GLM-4.6V-Flash share.

Takes config.json, token ids and the sizes of pictures; returns decoder settings, table rows and
three-part positions. Their layers are those of GLM-4-0414; each rotary angle turns with one of a
token's three positions: time, row, column.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from models.checkpoint.table import Weight
from models.config import DecoderConfig, check_fields, head_size, rope_of
from models.errors import ModelError
from models.family import Layout
from models.network.rope import interleaved_order

from .weight_rows import decoder_weights

CHANNELS = 3  # time, row, column
ROOT = "model.language_model."
LAYER = re.compile(re.escape(ROOT) + r"layers\.(\d+)\.")
NOT_RELEASED = "config.json says {field} {given}, the release has {wanted!r}; use its config.json"


def text_fields(config: dict) -> dict:
    """Fields of the language model: of text_config, and of the top level where that lacks them (the
    first GLM-4.1V files have no text_config)."""
    return config | (config.get("text_config") or {})


def text_decoder(text: dict) -> DecoderConfig:
    """Settings of the decoder whose fields are `text`; ModelError for sections of the rotary angles
    that do not add up."""
    check_fields(text, {"hidden_act": "silu"}, NOT_RELEASED)
    heads = text["num_attention_heads"]
    head_dim = text.get("head_dim") or head_size(text["hidden_size"], heads)
    return DecoderConfig(
        vocab_size=text["vocab_size"],
        hidden=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=heads,
        kv_heads=text["num_key_value_heads"],
        head_dim=head_dim,
        ffn=text["intermediate_size"],
        rope=_sectioned_rope(text, head_dim),
        eps=text["rms_norm_eps"],
        max_length=text["max_position_embeddings"],
        post_norms=True,
    )


def _sectioned_rope(text: dict, head_dim: int):
    """The plain rope, its angles divided among the three positions."""
    rope = rope_of(text, head_dim)
    parameters = text.get("rope_scaling") or text.get("rope_parameters") or {}
    if "mrope_section" not in parameters:
        raise ModelError(
            "config.json has no mrope_section among its rotary settings (rope_parameters or "
            "rope_scaling); take config.json from the release"
        )
    return replace(rope, channels=CHANNELS, sections=tuple(parameters["mrope_section"]))


def text_rows(d: DecoderConfig, names, qkv_bias: bool) -> Iterator[Weight]:
    """Table rows of the language model.

    names: of the checkpoint's tensors; a layer behind the last, which predicts the token after the
    next one (MTP), is known and dropped.
    """
    order = interleaved_order(d.head_dim, d.rope.dim)
    yield from decoder_weights(d, ROOT, "lm_head.weight", order, qkv_bias=qkv_bias, fused_mlp=True)
    for name, shape in names.items():
        found = LAYER.match(name)
        if found and int(found[1]) >= d.layers:
            yield Weight(name, shape, optional=True)


def picture_layout(ids: np.ndarray, image_token: int, grids: Sequence[tuple[int, int]]) -> Layout:
    """Three-part positions [T, 3] of a prompt: time, row, column.

    ids int64 [T], with one `image_token` for every row of image features. grids: (rows, columns) of
    each picture in features (2 x 2 patches), in order; a frame of a video is a picture. Text counts
    on in all three parts; a picture stands still in time, and the text behind it goes on as after
    the longer of its sides. ModelError unless the image tokens are those of the pictures.
    """
    starts = _picture_starts(ids, image_token, grids)
    parts = []
    done = 0  # tokens that have positions
    position = 0  # of the next text token
    for start, (rows, columns) in zip(starts, grids):
        parts.append(_text_positions(position, start - done))
        position += start - done
        parts.append(position + _places(rows, columns))
        position += max(rows, columns)
        done = start + rows * columns
    parts.append(_text_positions(position, len(ids) - done))
    position += len(ids) - done
    return Layout(
        np.concatenate(parts),
        next_position=(position,) * CHANNELS,
        position_step=(1,) * CHANNELS,
        image_starts=starts,
    )


def _text_positions(first: int, tokens: int) -> np.ndarray:
    """int64 [tokens, 3]: first, first + 1, ... in all three parts."""
    return np.arange(first, first + tokens)[:, None].repeat(CHANNELS, 1)


def _places(rows: int, columns: int) -> np.ndarray:
    """int64 [rows * columns, 3]: (0, row, column), row by row."""
    places = np.indices((1, rows, columns))
    return places.reshape(CHANNELS, -1).T


def _picture_starts(ids, image_token: int, grids) -> tuple[int, ...]:
    """Where each picture's tokens begin; ModelError unless they fill the places in the ids."""
    places = np.flatnonzero(ids == image_token)
    needed = sum(rows * columns for rows, columns in grids)
    if len(places) != needed:
        raise ModelError(
            f"the prompt has {len(places)} picture tokens (id {image_token}), but its {len(grids)} "
            f"pictures have {needed} rows; give one picture per mark, with its own grid"
        )
    starts = []
    done = 0  # places that are filled
    for rows, columns in grids:
        own = places[done : done + rows * columns]
        if own[-1] - own[0] != len(own) - 1:
            raise ModelError(
                f"the picture tokens (id {image_token}) of a picture of {rows} x {columns} must be "
                f"{len(own)} in a row; build the prompt with Engine.prompt"
            )
        starts.append(int(own[0]))
        done += len(own)
    return tuple(starts)
