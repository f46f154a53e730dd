"""Preflight: an ONNX file in, everything ATC would stumble over out, before ATC is started.

The rules are those of ATC's ONNX parser and of the NPU: operators registered for the graph's opset
(`onnx_ops_cann.json`: operator -> opsets, per CANN generation), static shapes of few dimensions, no integer index
arithmetic, and weights that can be found beside the file.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper

from models.config import VisionSpec

MAX_RANK = 6  # ATC allows 8; transposes above 6 dimensions leave the fast kernels
BUILT_IN = {"Constant"}
DATA_TYPES = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BOOL}
NAMES = {value: name.lower() for name, value in TensorProto.DataType.items()}


@dataclass(frozen=True)
class Finding:
    """`where` names the node, tensor or file."""

    where: str
    what: str

    def __str__(self):
        return f"{self.where}: {self.what}"


def preflight(path: Path, spec: VisionSpec, opset: int) -> tuple[list[Finding], Counter]:
    """Findings (none = fit for ATC) and the number of nodes per operator of the ONNX file at `path`.

    The weights are not read, only the place and size the file gives for them.
    """
    model = onnx.load(path, load_external_data=False)
    typed = onnx.shape_inference.infer_shapes(model, strict_mode=False).graph
    findings = [
        *_opset(model, opset),
        *_operators(model, opset),
        *interface(model.graph, spec),
        *_values(typed),
        *_external_data(model.graph, path),
        *_subgraphs(model.graph),
    ]
    if not findings:
        findings = _checker(path)
    return findings, Counter(node.op_type for node in model.graph.node)


def _opset(model, opset):
    found = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if found != {"ai.onnx": opset}:
        yield Finding("opset", f"is {found}, expected ai.onnx {opset} only")


def _operators(model, opset):
    table = json.loads(Path(__file__).with_name("onnx_ops_cann.json").read_text(encoding="utf-8"))
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            yield Finding(
                node.name, f"operator {node.domain}::{node.op_type} is not of the ai.onnx domain"
            )
        elif node.op_type not in BUILT_IN:
            known = table.get(node.op_type, {})
            missing = [
                cann for cann in ("CANN 7-8", "CANN 9") if opset not in _opsets(known.get(cann, ""))
            ]
            if missing:
                yield Finding(
                    node.name,
                    f"operator {node.op_type} at opset {opset} is unknown to {', '.join(missing)}",
                )


def _opsets(spans: str) -> set[int]:
    """ "8,10-12" -> {8, 10, 11, 12}"""
    ends = [span.split("-") for span in spans.split(",") if span]
    return {opset for end in ends for opset in range(int(end[0]), int(end[-1]) + 1)}


def interface(graph, spec: VisionSpec):
    """Findings about names, shapes and dtypes of the graph's input and output."""
    wanted = {
        "input": (spec.input_name, spec.input_shape),
        "output": (spec.output_name, spec.output_shape),
    }
    for kind, values in (("input", graph.input), ("output", graph.output)):
        found = [(v.name, _shape(v), v.type.tensor_type.elem_type) for v in values]
        if found != [(*wanted[kind], TensorProto.FLOAT)]:
            described = (
                ", ".join(f"{name} {NAMES[kind_]}{list(shape)}" for name, shape, kind_ in found)
                or "nothing"
            )
            yield Finding(
                f"graph {kind}",
                f"is {described}, expected {wanted[kind][0]} float{list(wanted[kind][1])}",
            )


def _values(graph):
    """Shape and type of what every node writes."""
    known = {v.name: v for v in (*graph.value_info, *graph.output)}
    for node in graph.node:
        for name in node.output:
            if name not in known:
                yield Finding(
                    node.name, "its output shape cannot be inferred; ATC needs static shapes"
                )
                continue
            shape = _shape(known[name])
            kind = known[name].type.tensor_type.elem_type
            if not all(isinstance(d, int) and d > 0 for d in shape):
                yield Finding(
                    node.name,
                    f"{node.op_type} writes the shape {list(shape)}; all dimensions must be fixed "
                    "and above 0",
                )
            if len(shape) > MAX_RANK:
                yield Finding(
                    node.name,
                    f"{node.op_type} writes {len(shape)} dimensions, at most {MAX_RANK} are fast "
                    "on the NPU",
                )
            if kind not in DATA_TYPES:
                yield Finding(
                    node.name,
                    f"{node.op_type} computes in {NAMES[kind]}; index arithmetic belongs into "
                    "constants",
                )


def _shape(value) -> tuple:
    return tuple(
        d.dim_value if d.HasField("dim_value") else d.dim_param or "?"
        for d in value.type.tensor_type.shape.dim
    )


def _external_data(graph, path: Path):
    placed = []
    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            placed.append(
                (
                    entry["location"],
                    int(entry.get("offset", 0)),
                    int(entry.get("length", 0)),
                    tensor.name,
                )
            )
        elif tensor.data_type == TensorProto.DOUBLE or not _finite(tensor):
            yield Finding(tensor.name, "is a constant in double precision, or not finite")
    sizes = {
        name: file.stat().st_size
        for name in {p[0] for p in placed}
        if "/" not in name and (file := path.parent / name).is_file()
    }
    ends = Counter()
    for location, offset, length, name in sorted(placed):
        if location not in sizes:
            yield Finding(name, f"its data file {location} does not lie beside {path.name}")
        elif offset + length > sizes[location]:
            yield Finding(
                name, f"its data ends at byte {offset + length:,}, beyond the end of {location}"
            )
        elif offset < ends[location]:
            yield Finding(name, f"its data overlaps another tensor's in {location}")
        ends[location] = max(ends[location], offset + length)


def _finite(tensor) -> bool:
    values = numpy_helper.to_array(tensor)
    return bool((abs(values) < float("inf")).all())


def _subgraphs(graph):
    for node in graph.node:
        for attribute in node.attribute:
            for tensor in attribute.g.initializer:
                if tensor.data_location == TensorProto.EXTERNAL:
                    yield Finding(
                        node.name,
                        f"{tensor.name} has its data outside a subgraph, where ATC does not look",
                    )


def _checker(path: Path) -> list[Finding]:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return [Finding(path.name, str(error).strip().splitlines()[0])]
    return []
