"""Rotary settings: transformers' rule decides where old and new fields stand side by side."""

import pytest

from models.config import Rope, rope_of
from models.errors import ModelError

CASES = [
    {},
    {"rope_theta": 5e4},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}},
    {"rope_theta": 5e4, "rope_parameters": {"rope_type": "default"}},
    {"rope_theta": 5e4, "rope_scaling": None, "rope_parameters": None},
    {"rope_theta": 1e4, "rope_scaling": {"rope_type": "default", "rope_theta": 5e4}},
    {"rope_theta": 5e4, "partial_rotary_factor": 0.25},
    {
        "partial_rotary_factor": 1.0,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e4,
            "partial_rotary_factor": 0.25,
        },
    },
]


@pytest.mark.parametrize("fields", CASES)
def test_old_and_new_fields_are_read_as_by_transformers(fields):
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.GlmConfig(hidden_size=64, num_attention_heads=4, head_dim=16, **fields)
    theirs = config.rope_parameters
    factor = theirs["partial_rotary_factor"]
    expected = Rope(dim=int(16 * factor), theta=float(theirs["rope_theta"]))
    assert rope_of(fields, 16, factor=0.5) == expected


@pytest.mark.parametrize("field", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("name", ["rope_type", "type"])
def test_scaled_positions_are_refused_by_name(field, name):
    with pytest.raises(ModelError, match="scales the rotary positions .*yarn"):
        rope_of({"rope_theta": 1e4, field: {name: "yarn", "factor": 4.0}}, 16)
