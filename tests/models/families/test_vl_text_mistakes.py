"""Mistakes that are easily made in the language part of GLM-OCR, GLM-4.1V and GLM-4.6V-Flash: each, put
into the settings, the weights or the positions, moves the logits far beyond the goldens' tolerance.

test_vl_text.py compares the same logits, so that each of these would fail there.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
from golden_cases import golden
from vl_text_golden import FAMILIES, float_weights, prompt_of

from models.config import DecoderConfig
from models.families.vl_text import text_decoder, text_fields
from models.family import Layout
from models.network.decoder import Decoder
from models.network.rope import interleaved_order, permute_heads, rotary_angles
from runtime.engine.kv_cache import KVCache
from runtime.engine.runner import Runner
from runtime.engine.sequence import Sequence
from runtime.ops.reference import ReferenceOps

CASES = ("img_wide", "img_tall")
STEPS = 4
BLOCK = 16
FAR = 40  # times the tolerance


@dataclass
class Model:
    """What a mistake may change. weights: by canonical name, in our order of rows. grids: (rows,
    columns) of the case's pictures in features."""

    config: DecoderConfig
    weights: dict[str, torch.Tensor]
    layout: Layout
    grids: list[tuple[int, int]]
    angles: Callable = Decoder.angles


def error_of(name: str, case: str, mistake: Callable[[Model], None] | None) -> float:
    """Largest difference of the logits of prompt and answer from the golden ones."""
    told = golden(name)
    prompt = prompt_of(name, case)
    grids = [tuple(told.of(each, "grid_thw")[0, 1:] // 2) for each in told.pictures(case)]
    config = text_decoder(text_fields(told.config))
    model = Model(config, dict(float_weights(name, ReferenceOps())), prompt.layout, grids)
    if mistake:
        mistake(model)
    operators = ReferenceOps()
    decoder = Decoder(model.config, model.weights, operators)
    decoder.angles = partial(model.angles, decoder)
    cache = KVCache(model.config, 8, BLOCK, torch.float32, "cpu", operators)
    runner = Runner(decoder, cache)
    sequence = Sequence(replace(prompt, layout=model.layout), list(range(8)))
    rows = [runner.prefill(sequence, told.features(case))]
    for token in told.greedy(case)[: STEPS - 1]:
        rows.append(runner.decode([sequence], [token]))
    return float(np.abs(torch.cat(rows).numpy() - told.of(case, "step_logits")[:STEPS]).max())


# the rope


def with_rope(**changes):
    def change(model):
        model.config = replace(model.config, rope=replace(model.config.rope, **changes))

    return change


def strided_sections(model):
    """Channels t, h, w, t, h, w, ... instead of one after another; the rest is that of h and w."""
    strided = torch.arange(model.config.rope.dim // 2) % 3

    def angles(decoder, positions):
        plain = replace(decoder.config.rope, sections=(), channels=1)
        each = [
            rotary_angles(plain, decoder.config.head_dim, positions[:, channel : channel + 1])
            for channel in range(3)
        ]
        half = decoder.config.head_dim // 2
        chosen = torch.zeros(half, dtype=torch.int64)
        chosen[: len(strided)] = strided
        chosen = torch.cat((chosen, chosen))
        columns = torch.arange(len(chosen))
        return tuple(
            torch.stack([one[part] for one in each])[chosen, :, columns].T for part in (0, 1)
        )

    model.angles = angles


def half_style(model):
    """The halves of the rotated part are the pairs, as in LLaMA, instead of neighbours."""
    rotated = torch.arange(model.config.rope.dim)
    rest = torch.arange(model.config.rope.dim, model.config.head_dim)
    first, second = rest.chunk(2) if len(rest) else (rest, rest)
    low, high = rotated.chunk(2)
    halves = torch.cat((low, first, high, second))
    ours = interleaved_order(model.config.head_dim, model.config.rope.dim)
    _reorder_heads(model, torch.argsort(ours)[halves])


def _reorder_heads(model, order):
    c = model.config
    rows = (c.heads + c.kv_heads) * c.head_dim
    for name, tensor in model.weights.items():
        if ".qkv." in name:
            tensor = tensor.clone()
            tensor[:rows] = permute_heads(tensor[:rows], order)
            model.weights[name] = tensor


# positions


def positions_of(change):
    """`change`: of the layout's positions [T, 3], which it returns."""

    def changed(model):
        positions = change(model.layout.positions.copy())
        model.layout = replace(model.layout, positions=positions)

    return changed


def plain_positions(model):
    """0, 1, 2, ... as in a text."""
    length = len(model.layout.positions)
    positions = np.arange(length)[:, None].repeat(3, 1)
    model.layout = replace(model.layout, positions=positions, next_position=(length,) * 3)


def delta_ignored(model):
    """The prompt is right, the answer goes on at its number of tokens."""
    length = len(model.layout.positions)
    model.layout = replace(model.layout, next_position=(length,) * 3)


def next_position(moved_by: Callable[[int, int], int]):
    """Text behind a picture of (rows, columns) begins by moved_by(rows, columns) too far."""

    def change(model):
        positions = model.layout.positions.copy()
        end = len(positions)
        for start, (rows, columns) in zip(model.layout.image_starts, model.grids):
            positions[start + rows * columns : end] += moved_by(rows, columns)
        late = sum(moved_by(rows, columns) for rows, columns in model.grids)
        following = tuple(position + late for position in model.layout.next_position)
        model.layout = replace(model.layout, positions=positions, next_position=following)

    return change


def walked_by_columns(model):
    positions = model.layout.positions.copy()
    for start, (rows, columns) in zip(model.layout.image_starts, model.grids):
        own = positions[start : start + rows * columns]
        positions[start : start + rows * columns] = (
            own.reshape(rows, columns, 3).transpose(1, 0, 2).reshape(-1, 3)
        )
    model.layout = replace(model.layout, positions=positions)


# weights


def renamed(first: str, second: str):
    """The weights of `first` and `second` of every layer change places."""

    def change(model):
        for i in range(model.config.layers):
            names = [f"layers.{i}.{part}.weight" for part in (first, second)]
            tensors = [model.weights[name] for name in names]
            model.weights.update(zip(names, reversed(tensors)))

    return change


def without(part: str):
    def change(model):
        model.weights = {name: w for name, w in model.weights.items() if part not in name}

    return change


def gate_and_up_swapped(model):
    for name, tensor in model.weights.items():
        if ".up." in name:
            model.weights[name] = torch.cat(tensor.chunk(2)[::-1])


def heads_tiled(model):
    """Query head j takes key/value head j modulo their number, instead of neighbours one."""
    c = model.config
    order = torch.arange(c.heads).view(-1, c.kv_heads).T.flatten()
    rows = (order[:, None] * c.head_dim + torch.arange(c.head_dim)).flatten()
    for name, tensor in model.weights.items():
        if ".qkv." in name:
            model.weights[name] = torch.cat((tensor[: len(rows)][rows], tensor[len(rows) :]))
        elif ".out." in name:
            model.weights[name] = tensor[:, rows]


def scale_of_hidden_size(model):
    """Scores over the root of hidden / heads instead of head_dim."""
    c = model.config
    factor = (c.head_dim * c.heads / c.hidden) ** 0.5
    for name, tensor in model.weights.items():
        if ".qkv." in name:
            tensor = tensor.clone()
            tensor[: c.heads * c.head_dim] *= factor
            model.weights[name] = tensor


def with_config(**changes):
    def change(model):
        model.config = replace(model.config, **changes)

    return change


EVERYWHERE = {
    "halves are the pairs": half_style,
    "another base": with_rope(theta=20000.0),
    "the first position alone": positions_of(lambda positions: positions[:, :1].repeat(3, 1)),
    "sections of rows and columns swapped": positions_of(lambda each: each[:, [0, 2, 1]]),
    "time and rows swapped": positions_of(lambda each: each[:, [1, 0, 2]]),
    "columns, rows, time": positions_of(lambda each: each[:, [2, 1, 0]]),
    "sections strided": strided_sections,
    "walked by columns": walked_by_columns,
    "positions of a text": plain_positions,
    "delta ignored while decoding": delta_ignored,
    "one position too far": next_position(lambda rows, columns: 1),
    "as many positions as tokens": next_position(lambda r, c: r * c - max(r, c)),
    "sides before they are merged": next_position(max),
    "shorter side": next_position(lambda r, c: min(r, c) - max(r, c)),
    "norms of attention and MLP swapped": renamed("attention_norm", "mlp_norm"),
    "norms behind the branches swapped": renamed("attention_post_norm", "mlp_post_norm"),
    "norm behind attention before the MLP": renamed("attention_post_norm", "mlp_norm"),
    "no norm behind attention": without("attention_post_norm"),
    "no norm behind the MLP": without("mlp_post_norm"),
    "gate and up swapped": gate_and_up_swapped,
    "key/value heads tiled": heads_tiled,
    "epsilon 1e-6": with_config(eps=1e-6),
}
BIASED = ("glm41v", "glm46v")
ALONE = [
    ("glm_ocr", "scale of hidden / heads", scale_of_hidden_size),
    ("glm46v", "base of GLM-4.1V", with_rope(theta=10000.0)),
    *((name, "biases dropped", without("qkv.bias")) for name in BIASED),
]
MISTAKES = [(name, told, make) for name in FAMILIES for told, make in EVERYWHERE.items()] + ALONE


@pytest.mark.parametrize("name", FAMILIES)
def test_without_a_mistake(name):
    assert max(error_of(name, case, None) for case in CASES) < golden(name).atol


@pytest.mark.parametrize(
    "name, mistake",
    [(name, make) for name, _, make in MISTAKES],
    ids=[m[0] + ": " + m[1] for m in MISTAKES],
)
def test_a_mistake_is_seen(name, mistake):
    found = max(error_of(name, case, mistake) for case in CASES)
    assert found > FAR * golden(name).atol
