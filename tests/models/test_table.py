"""The weight table: what a target's name says, and which rows fill the decoder, a layer, the tower."""

import paths
import pytest

from models import family_of
from models.checkpoint.table import Part, Target, Weight, WeightTable

FAMILIES = ["visualglm", "glm4", "glm4/hf", "glm4v", "llava", "glm_edge", "glm_edge_v"]


@pytest.mark.parametrize(
    "name, module, tensor, role, layer, in_vision",
    [
        ("layers.12.qkv.weight", "layers.12.qkv", "weight", "qkv", 12, False),
        ("layers.0.mlp_norm.bias", "layers.0.mlp_norm", "bias", "mlp_norm", 0, False),
        ("lm_head.weight", "lm_head", "weight", "lm_head", None, False),
        ("vision.tower.blocks.1.mlp.up.weight", "vision.tower.blocks.1.mlp.up", "weight", "up", None, True),
        ("vision.cls", "vision", "cls", "vision", None, True),
        ("x", "", "x", "", None, False),
    ],
)  # fmt: skip
def test_what_a_name_says(name, module, tensor, role, layer, in_vision):
    target = Target.parse(name)
    assert str(target) == name and not target.is_piece
    assert (target.module, target.tensor, target.role) == (module, tensor, role)
    assert (target.layer, target.in_vision) == (layer, in_vision)


def test_pieces_of_one_tensor_are_different_targets():
    pieces = [Target("layers.0.qkv", "weight", row, "W8A8") for row in (0, 256)]
    assert len({*pieces, Target.parse("layers.0.qkv.weight")}) == 3
    assert [str(piece) for piece in pieces][1] == "layers.0.qkv#256:W8A8.weight"
    assert {piece.role for piece in pieces} == {"qkv"} and pieces[1].layer == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_row_that_is_used_has_one_place(name):
    """In the vision encoder, or in one layer, or in the decoder outside the layers."""
    family = family_of(paths.GOLDEN / name)
    table = WeightTable(family.weights())
    layers = [table.layer(i) for i in range(family.decoder.layers)]
    assert sum(layers, []) == table.layers() and all(layers)
    assert len(table.decoder()) + len(table.vision()) == len(table.used()) <= len(table)
    assert bool(table.vision()) == bool(family.vision)
    outside = {row.target.module for row in table.decoder() if row.target.layer is None}
    assert {"embed", "final_norm"} <= outside <= {"embed", "final_norm", "lm_head"}


def test_sources_of_a_target():
    both = (Part("embed.weight"), Part("lm_head.weight"))
    qkv = [Weight(name, (4, 4), (Part("layers.0.qkv.weight", at=(i, 3)),)) for i, name in enumerate("qkv")]  # fmt: skip
    table = WeightTable([Weight("tied", (8, 4), both), *qkv, Weight("dropped", (1,))])
    assert table.source_of("lm_head.weight") == table.source_of("embed.weight") == "tied"
    assert table.sources_of("layers.0.qkv.weight") == ["q", "k", "v"]
