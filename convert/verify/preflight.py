"""Preflight. Takes an ONNX file, returns everything in it that ATC would refuse.

The rules are those of ATC's ONNX parser and of the NPU: operators registered for the graph's opset
(`onnx_ops_cann.json`: operator -> opsets, per CANN generation), static shapes of few dimensions, no
integer index arithmetic, and weights that can be found beside the file.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import TensorProto, numpy_helper

from models.config import PatchSpec, VisionSpec
from models.files import native_path

MAX_RANK = 6  # ATC allows 8; transposes above 6 dimensions leave the fast kernels
BUILT_IN = {"Constant"}
DATA_TYPES = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BOOL}
CANN_GENERATIONS = ("CANN 7-8", "CANN 9")


@dataclass(frozen=True)
class Finding:
    """`where` names the node, tensor or file."""

    where: str
    what: str

    def __str__(self):
        return f"{self.where}: {self.what}"


def preflight(
    path: Path, spec: VisionSpec | PatchSpec, opset: int
) -> tuple[list[Finding], Counter]:
    """Findings in the ONNX file (none = fit for ATC), and the number of nodes per operator.

    The weights are not read, only the place and size that the file gives for them.
    """
    model = onnx.load(path, load_external_data=False)
    typed = onnx.shape_inference.infer_shapes(model, strict_mode=False).graph
    findings = [
        *_opset_findings(model, opset),
        *_operator_findings(model.graph, opset),
        *interface_findings(model.graph, spec),
        *_value_findings(typed, free_dimensions(spec)),
        *_constant_findings(model.graph),
        *_data_file_findings(model.graph, path),
        *_subgraph_findings(model.graph),
    ]
    if not findings:
        findings = _checker_findings(path)
    return findings, Counter(node.op_type for node in model.graph.node)


def _opset_findings(model: onnx.ModelProto, opset: int) -> Iterator[Finding]:
    found = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    if found != {"ai.onnx": opset}:
        yield Finding("opset", f"is {found}, expected ai.onnx {opset} only")


def _operator_findings(graph: onnx.GraphProto, opset: int) -> Iterator[Finding]:
    table = json.loads(Path(__file__).with_name("onnx_ops_cann.json").read_text(encoding="utf-8"))
    for node in graph.node:
        operator = node.op_type
        if node.domain not in ("", "ai.onnx"):
            yield Finding(
                node.name, f"operator {node.domain}::{operator} is not of the ai.onnx domain"
            )
        elif operator not in BUILT_IN:
            missing = _generations_without(table.get(operator, {}), opset)
            if missing:
                yield Finding(
                    node.name,
                    f"operator {operator} at opset {opset} is unknown to {', '.join(missing)}",
                )


def _generations_without(known: dict[str, str], opset: int) -> list[str]:
    """CANN generations that lack an operator at this opset; `known`: {generation: opsets}."""
    missing = []
    for generation in CANN_GENERATIONS:
        if not _covers(known.get(generation, ""), opset):
            missing.append(generation)
    return missing


def _covers(spans: str, opset: int) -> bool:
    """Whether "8,10-12" has the opset: 8, 10, 11 or 12."""
    for span in spans.split(",") if spans else ():
        first, _, last = span.partition("-")
        if int(first) <= opset <= int(last or first):
            return True
    return False


def interface_findings(graph: onnx.GraphProto, spec: VisionSpec | PatchSpec) -> Iterator[Finding]:
    """Findings about names, shapes and dtypes of the graph's inputs and output."""
    for kind, values, shapes in (
        ("input", graph.input, spec.inputs),
        ("output", graph.output, {spec.output_name: spec.output_shape}),
    ):
        found = ", ".join(map(_described, values)) or "nothing"
        expected = ", ".join(f"{name} float{list(shape)}" for name, shape in shapes.items())
        if found != expected:
            yield Finding(f"graph {kind}", f"is {found}, expected {expected}")


def _described(value: onnx.ValueInfoProto) -> str:
    """Name, dtype and shape, e.g. "input float[1, 224, 224, 3]"."""
    return f"{value.name} {_dtype_name(value)}{list(_shape(value))}"


def free_dimensions(spec: VisionSpec | PatchSpec) -> set[str]:
    """Names of the dimensions that may be free."""
    shapes = (*spec.inputs.values(), spec.output_shape)
    return {size for shape in shapes for size in shape if isinstance(size, str)}


def _value_findings(graph: onnx.GraphProto, free: set[str]) -> Iterator[Finding]:
    """Findings about shape and dtype of what every node writes; dimensions named in `free` may be."""
    known = {value.name: value for value in (*graph.value_info, *graph.output)}
    for node in graph.node:
        for name in node.output:
            if name in known:
                problems = _value_problems(node.op_type, known[name], free)
            else:
                problems = ["its output shape cannot be inferred; ATC needs static shapes"]
            for problem in problems:
                yield Finding(node.name, problem)


def _value_problems(operator: str, value: onnx.ValueInfoProto, free: set[str]) -> Iterator[str]:
    shape = _shape(value)
    if not all(size in free or _is_fixed(size) for size in shape):
        yield (
            f"{operator} writes the shape {list(shape)}; all dimensions must be fixed and above 0"
        )
    if len(shape) > MAX_RANK:
        yield (f"{operator} writes {len(shape)} dimensions, at most {MAX_RANK} are fast on the NPU")
    if value.type.tensor_type.elem_type not in DATA_TYPES:
        yield (
            f"{operator} computes in {_dtype_name(value)}; index arithmetic belongs into constants"
        )


def _is_fixed(size: int | str) -> bool:
    return isinstance(size, int) and size > 0


def _dtype_name(value: onnx.ValueInfoProto) -> str:
    return TensorProto.DataType.Name(value.type.tensor_type.elem_type).lower()


def _shape(value: onnx.ValueInfoProto) -> tuple:
    """Numbers; for a free dimension its name, or "?"."""
    shape = []
    for dim in value.type.tensor_type.shape.dim:
        if dim.HasField("dim_value"):
            shape.append(dim.dim_value)
        else:
            shape.append(dim.dim_param or "?")
    return tuple(shape)


def _constant_findings(graph: onnx.GraphProto) -> Iterator[Finding]:
    for tensor in graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL and not _fit_constant(tensor):
            yield Finding(tensor.name, "is a constant in double precision, or not finite")


def _fit_constant(tensor: onnx.TensorProto) -> bool:
    if tensor.data_type == TensorProto.DOUBLE:
        return False
    values = numpy_helper.to_array(tensor)
    return bool((abs(values) < float("inf")).all())


def _data_file_findings(graph: onnx.GraphProto, path: Path) -> Iterator[Finding]:
    """Findings about weights whose bytes are not in a file beside `path`, or lie on another's."""
    ends = Counter()
    for location, offset, length, name in sorted(_external_tensors(graph)):
        size = _size_beside(path, location)
        end = offset + length
        if size is None:
            yield Finding(name, f"its data file {location} does not lie beside {path.name}")
        elif end > size:
            yield Finding(name, f"its data ends at byte {end:,}, beyond the end of {location}")
        elif offset < ends[location]:
            yield Finding(name, f"its data overlaps another tensor's in {location}")
        ends[location] = max(ends[location], end)


def _external_tensors(graph: onnx.GraphProto) -> Iterator[tuple[str, int, int, str]]:
    """(data file, offset, length, name) of every weight that is not in the ONNX file itself."""
    for tensor in graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            offset = int(entry.get("offset", 0))
            length = int(entry.get("length", 0))
            yield entry["location"], offset, length, tensor.name


def _size_beside(path: Path, location: str) -> int | None:
    """Bytes of the data file; None unless it lies in the directory of `path`."""
    file = path.parent / location
    return file.stat().st_size if "/" not in location and file.is_file() else None


def _subgraph_findings(graph: onnx.GraphProto) -> Iterator[Finding]:
    for node in graph.node:
        for attribute in node.attribute:
            for tensor in attribute.g.initializer:
                if tensor.data_location == TensorProto.EXTERNAL:
                    yield Finding(
                        node.name,
                        f"{tensor.name} has its data outside a subgraph, where ATC does not look",
                    )


def _checker_findings(path: Path) -> list[Finding]:
    """What onnx.checker itself finds; only its first line."""
    try:
        with native_path(path) as name:
            onnx.checker.check_model(name, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return [Finding(path.name, str(error).strip().splitlines()[0])]
    return []
