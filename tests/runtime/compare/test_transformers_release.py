"""`--reference transformers`: releases before 5 are refused where they would compute other logits."""

import pytest

from runtime.common.errors import MISSING_COMPONENT, ToolkitError
from runtime.compare.transformers_engine import check_release

OLD = {"rope_theta": 1e4, "partial_rotary_factor": 0.5}
NEW = {"rope_parameters": {"rope_theta": 1e4}}


@pytest.mark.parametrize("config", [NEW, OLD | NEW, {"text_config": NEW}])
def test_rope_parameters_need_transformers_5(config):
    check_release("5.0.0", config, "folder")
    with pytest.raises(ToolkitError, match="transformers 4.57.6 .* of folder/config.json") as error:
        check_release("4.57.6", config, "folder")
    assert error.value.exit_code == MISSING_COMPONENT


@pytest.mark.parametrize("config", [OLD, {"text_config": OLD}, {"text_config": None}])
def test_older_settings_do_not(config):
    check_release("4.57.6", config, "folder")


def test_a_config_that_transformers_does_not_read():
    """The first GLM-4.1V files have the language model's fields at the top."""
    flat = {"model_type": "glm4v", "hidden_size": 128, "vision_config": {}}
    with pytest.raises(ToolkitError, match="has no text_config, .* leave --reference out"):
        check_release("5.23.0", flat, "folder")
    check_release("5.23.0", flat | {"text_config": {"hidden_size": 128}}, "folder")
