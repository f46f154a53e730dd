"""Graphs that are not the family's: what they are asked or what they give ends in one sentence."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from models.config import VisionSpec
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.vision.onnx_session import OnnxVision

PIXELS = np.zeros((2, 4, 4, 3), np.float32)


def session(folder, side: int, axes: list[int]) -> OnnxVision:
    """Of a graph that takes pictures of `side` and gives their means over `axes`."""
    constant = helper.make_tensor("axes", TensorProto.INT64, [len(axes)], axes)
    node = helper.make_node("ReduceMean", ["input", "axes"], ["output"], keepdims=0)
    taken = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, side, side, 3])
    given = helper.make_tensor_value_info("output", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "graph", [taken], [given], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, folder / "vision.onnx")
    return OnnxVision(folder, VisionSpec((1, 4, 4, 3), (1, 4, 3)), threads=1)


def test_a_graph_of_this_shape(tmp_path):
    assert session(tmp_path, 4, [1]).encode(PIXELS).shape == (2, 4, 3)


def test_a_graph_for_other_pictures(tmp_path):
    with pytest.raises(ToolkitError, match=r"vision.onnx cannot be computed .*--force") as caught:
        session(tmp_path, 8, [1]).encode(PIXELS)
    assert caught.value.exit_code == CHECK_FAILED


def test_features_of_another_shape_are_not_repeated(tmp_path):
    """numpy would write one row into all places."""
    with pytest.raises(ToolkitError, match=r"gave features \[1, 3\], not \[1, 4, 3\]"):
        session(tmp_path, 4, [1, 2]).encode(PIXELS)
