"""The parts of the export: tracing folded blocks, the data file, the graph check, the atc command's chip names."""

import hashlib
import os
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from convert.atc.option_rules import check_soc
from convert.export.data_file import DataFile
from convert.export.trace import trace
from convert.export.write import register_weights
from convert.verify.preflight import preflight
from models.config import VisionSpec
from models.network.vision_blocks import Dense, PreNormBlock
from runtime.common.errors import ToolkitError
from runtime.vision import artifact
from runtime.vision.onnx_session import OnnxVision

# trace


class Tower(nn.Module):
    """Blocks that look alike and are not: the third has other settings, the fourth another shape."""

    def __init__(self):
        super().__init__()
        widths = [(8, 2, 16, 1e-6), (8, 2, 16, 1e-6), (8, 4, 16, 1e-1), (8, 2, 24, 1e-6)]
        self.stem = Dense(3, 8)
        self.blocks = nn.ModuleList(PreNormBlock(*each) for each in widths)

    def forward(self, pixels):
        x = self.stem(pixels.flatten(1, 2))
        for block in self.blocks:
            x = block(x)
        return x


def test_folded_blocks_keep_their_own_settings(tmp_path):
    torch.manual_seed(0)
    tower = Tower()
    spec = VisionSpec((1, 2, 3, 3), (1, 6, 8))
    weights = {name: nn.init.normal_(parameter) for name, parameter in tower.named_parameters()}
    model = trace(Tower, spec)
    assert {value.name for value in model.graph.inputs} == {"input", *weights}
    with DataFile(tmp_path / artifact.DATA) as data:
        for value in model.graph.inputs[1:]:
            value.const_value = data.write(value.name, weights[value.name].detach())
    register_weights(model.graph, 1)
    ir.save(model, tmp_path / artifact.ONNX)
    assert preflight(tmp_path / artifact.ONNX, spec, 17)[0] == []
    pixels = np.random.default_rng(0).normal(size=spec.input_shape).astype(np.float32)
    expected = tower(torch.from_numpy(pixels)).detach().numpy()
    np.testing.assert_allclose(
        OnnxVision(tmp_path, spec).encode(pixels), expected, rtol=1e-4, atol=1e-4
    )


def test_an_operator_that_opset_17_defines_differently_is_named():
    class Maximum(nn.Module):
        def forward(self, pixels):
            return pixels.amax(dim=1)

    with pytest.raises(ToolkitError, match="ReduceMax"):
        trace(Maximum, VisionSpec((1, 2, 3, 3), (1, 3, 3)))


# the data file


@pytest.mark.parametrize("folder", [None, "/dev/shm"], ids=["disk", "memory"])
def test_data_file(tmp_path, folder):
    path = Path(folder or tmp_path) / f"data-{os.getpid()}"
    tensors = [torch.randn(3, 5), torch.zeros(0), torch.randn(3_000_000), torch.randn(4, 6).t()]
    try:
        with DataFile(path) as data:
            places = [data.write(str(index), tensor) for index, tensor in enumerate(tensors)]
        content = path.read_bytes()
    finally:
        path.unlink()
    assert len(content) == data.size and hashlib.sha256(content).hexdigest() == data.sha256
    for place, tensor in zip(places, tensors):
        assert place.offset % 4096 == 0
        piece = content[place.offset : place.offset + place.length]
        assert piece == tensor.contiguous().numpy().tobytes()


# the graph check

SPEC = VisionSpec((1, 4), (1, 4))


def graph(tmp_path, nodes, opset=17, domain="", shape=(1, 4), initializers=()):
    """ONNX file input [1, 4] -> nodes -> output."""
    value = helper.make_tensor_value_info
    built = helper.make_graph(
        nodes,
        "g",
        [value("input", TensorProto.FLOAT, shape)],
        [value("output", TensorProto.FLOAT, shape)],
        list(initializers),
    )
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    (tmp_path / "g.onnx").write_bytes(
        helper.make_model(built, opset_imports=opsets).SerializeToString()
    )
    return tmp_path / "g.onnx"


def node(op, inputs=("input",), output="output", name="it", **attributes):
    return helper.make_node(op, list(inputs), [output], name=name, **attributes)


def constant(name, array):
    return onnx.numpy_helper.from_array(np.asarray(array), name)


def external(name, location):
    tensor = constant(name, np.zeros((1, 4), np.float32))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=text)
    return tensor


@pytest.mark.parametrize(
    "arguments, where, says",
    [
        ({"nodes": [node("Erf")], "opset": 18}, "opset", "expected ai.onnx 17"),
        (
            {"nodes": [node("FastGelu", domain="com.microsoft")], "domain": "com.microsoft"},
            "it",
            "com.microsoft::FastGelu",
        ),
        (
            {
                "nodes": [
                    node("QuantizeLinear", ("input", "scale"), "q"),
                    node("DequantizeLinear", ("q", "scale"), name="back"),
                ],
                "initializers": [constant("scale", np.float32(1))],
            },
            "it",
            "QuantizeLinear at opset 17 is unknown",
        ),
        ({"nodes": [node("Erf")], "shape": (1, "n")}, "it", "must be fixed"),
        ({"nodes": [node("Erf")], "shape": (1, 5)}, "graph input", "expected input float[1, 4]"),
        (
            {"nodes": [node("Shape", output="s"), node("Reshape", ("input", "s"), name="r")]},
            "it",
            "index arithmetic",
        ),
        (
            {
                "nodes": [
                    node("Reshape", ("input", "s"), "wide"),
                    node("Reshape", ("wide", "t"), name="back"),
                ],
                "initializers": [constant("s", [1, 1, 1, 1, 1, 1, 4]), constant("t", [1, 4])],
            },
            "it",
            "writes 7 dimensions",
        ),
        (
            {
                "nodes": [node("Add", ("input", "w"))],
                "initializers": [constant("w", np.float32([[1, 2, np.inf, 4]]))],
            },
            "w",
            "not finite",
        ),
        (
            {
                "nodes": [node("Add", ("input", "w"))],
                "initializers": [external("w", "elsewhere/data")],
            },
            "w",
            "beside",
        ),
        (
            {
                "nodes": [node("Add", ("input", "w"))],
                "initializers": [external("w", "g.onnx.data")],
            },
            "w",
            "beyond the end",
        ),
    ],
)
def test_the_graph_check_names_the_place(tmp_path, arguments, where, says):
    (tmp_path / "g.onnx.data").write_bytes(b"12345678")
    findings, _ = preflight(graph(tmp_path, **arguments), SPEC, 17)
    assert any(finding.where == where and says in finding.what for finding in findings), findings


def test_a_fit_graph_passes_the_check(tmp_path):
    findings, operators = preflight(graph(tmp_path, [node("Erf")]), SPEC, 17)
    assert findings == [] and operators == {"Erf": 1}


@pytest.mark.parametrize("name", ["Ascend910B3", "Ascend310P3", "Ascend910B4-1", "Ascend910_9392"])
def test_known_chips(name):
    check_soc(name)
