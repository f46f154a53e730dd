"""`python -m convert.nodes`: where inside does an exported encoder leave the torch module? Exit 0 nowhere, 1 it does.

A checkpoint and a folder with vision.onnx flow in; every module's result, which is the output of the ONNX node that ends
the module, is compared in fp32 over all elements on one picture; a table under msit's columns flows out, and the first
node that departs is named. torch runs block by block and leaves its results in files, the graph runs in pieces.
"""
import csv
import io
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import CHECK_FAILED, ToolkitError, run_command
from runtime.options import Parser, check_folder, flag, require

LIMIT = 3e-5            # relative Euclidean distance; grows to 2e-6 over the towers of all families
PIECE = 64 << 20        # bytes of weights in memory at a time


@dataclass(kw_only=True)
class NodesOptions:
    model: str = flag("folder of the checkpoint", "-m", "--model-path", metavar="DIR")
    artifact: str = flag("folder with vision.onnx, written by `python -m convert`", metavar="DIR")
    out: str = flag("table of all compared nodes", metavar="FILE.csv")
    image: str | None = flag("picture (default: a drawn one)", "--input-image", default=None, metavar="FILE")
    limit: float = flag("largest relative Euclidean distance that passes", default=LIMIT, kind=float, metavar="X")

    def __post_init__(self):
        check_folder("model", self.model)
        require(self, "artifact", (Path(self.artifact) / "vision.onnx").is_file(),
                "there is no vision.onnx in it; give the --out folder of python -m convert")
        require(self, "out", Path(self.out).parent.is_dir(), "its folder does not exist; make it first")
        require(self, "limit", self.limit > 0, "more than 0 is needed, e.g. 3e-5")


@dataclass
class Node:
    """An ONNX node that ends a torch module, and how far its output is from the module's."""
    index: int
    name: str
    operator: str
    output: str
    module: str
    shape: tuple = ()
    measures: dict | None = None


def main(argv) -> int:
    options, = Parser("python -m convert.nodes", "--model DIR --artifact DIR --out FILE.csv [options]",
                      "Compare the inside of an exported vision encoder with torch, node by node. Exit code 0: all are "
                      "within the limit, 1: the first that is not is named.", {"what to compare": NodesOptions}).parse(argv)
    from runtime.artifact import write_atomically
    nodes = compare(options.model, Path(options.artifact), options.image)
    write_atomically(Path(options.out), table(nodes, options.limit))
    failed = [node for node in nodes if not passes(node, options.limit)]
    print(f"{len(nodes)} nodes compared, {len(failed)} depart; {options.out}")
    if failed:
        print(f"FAILED: {describe(failed[0])}")
        return CHECK_FAILED
    print(f"PASSED: no relative distance is above {options.limit:g}; the largest, {distance(worst(nodes)):.2e}, is at "
          f"{worst(nodes).name}")
    return 0


def compare(model: str, folder: Path, image: str | None = None) -> list[Node]:
    """Every node that ends a module of the tower, in the order of the graph. ToolkitError when nothing can be compared."""
    import numpy as np

    from models import family_of
    from models.checkpoint import Checkpoint
    from runtime.progress import step_progress

    from .piecewise import StreamedGraph, StreamedTower
    from .verify import pictures
    family = family_of(model)
    if family.vision is None:
        raise ToolkitError(f"{family.name} is a text model; python -m runtime.compare compares its layers")
    pixels = family.pixels(image or pictures()["scene"])
    tower = StreamedTower(family, Checkpoint(model))
    with tempfile.TemporaryDirectory(prefix="ascend-vlm-") as work, step_progress("torch", tower.steps) as tower.advance:
        shapes = record(tower, pixels, Path(work))
        graph = StreamedGraph(folder, PIECE)
        nodes = ends_of_modules(graph.model.graph, shapes)
        if not nodes:
            raise ToolkitError(f"{folder} has no node that ends a module of {family.name}'s encoder; give the folder that "
                               "python -m convert wrote for this model", CHECK_FAILED)
        by_output = {node.output: node for node in nodes}
        with step_progress("ONNX", graph.steps) as graph.advance:
            for name, value in graph.values(pixels, list(by_output)):
                by_output[name].measures = measure(np.load(Path(work) / f"{by_output[name].module}.npy"), value)
    return nodes


def record(tower, pixels, work: Path) -> dict[str, tuple]:
    """Run the tower; the result of every module that is called once goes to a file. {module path: shape}."""
    import numpy as np
    calls, shapes = {}, {}

    def keep(path):
        def hook(module, inputs, output):
            calls[path] = calls.get(path, 0) + 1
            shapes[path] = tuple(output.shape)
            np.save(work / f"{path}.npy", output.numpy())
        return hook
    for path, module in tower.tower.named_modules():
        if path:
            module.register_forward_hook(keep(path))
    tower.run(pixels)
    return {path: shape for path, shape in shapes.items() if calls[path] == 1}


def ends_of_modules(graph, shapes: dict[str, tuple]) -> list[Node]:
    """Nodes are named `module path/operator`: the last one under a module's path gives its result, if it is its own."""
    last, known = {}, {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim)
                       for v in (*graph.value_info, *graph.output)}
    for index, node in enumerate(graph.node):
        scope = node.name.rpartition("/")[0]
        own = next((path for path in (scope, f"tower.{scope}") if path in shapes), None)
        parts = (own or scope).split(".")
        for depth in range(1, len(parts) + 1):
            last[".".join(parts[:depth])] = Node(index, node.name, node.op_type, node.output[0], own)
    found = [node for path, node in last.items() if node.module == path]
    for node in found:
        node.shape = known.get(node.output, ())
    return sorted((n for n in found if n.shape == shapes[n.module]), key=lambda n: n.index)


def measure(reference, candidate) -> dict:
    """metrics of the two tensors as one row each, and what only msit's table wants."""
    import numpy as np

    from runtime.metrics import compare_rows, kl, summarize
    a, b = (x.reshape(1, -1).astype(np.float64) for x in (reference, candidate))
    finite = np.isfinite(a).all() and np.isfinite(b).all()
    return {**summarize([compare_rows(a, b)]), "shape": list(reference.shape),
            "accumulated": float(np.abs(a - b).sum() / max(np.abs(a).sum(), 1e-30)),
            "kl": float(kl(a, b)[0]) if finite else float("nan"),
            "moments": [(float(x.mean()), float(x.std())) for x in (b, a)]}


def distance(node: Node) -> float:
    return node.measures["relative_euclidean"]


def worst(nodes: list[Node]) -> Node:
    return max(nodes, key=distance)


def passes(node: Node, limit: float) -> bool:
    """False for NaN."""
    return distance(node) <= limit


def describe(node: Node) -> str:
    m = node.measures
    what = f"{m['nonfinite']:,} values are NaN or Inf" if m["nonfinite"] else f"relative distance {distance(node):.2e}"
    return (f"{node.name} ({node.operator}, {m['shape']}, torch module {node.module}) is the first node that departs: {what}, "
            f"cosine {m['cosine_min']:.8f}")


def table(nodes: list[Node], limit: float) -> str:
    """msit's columns; NPUDump is the ONNX node, GroundTruth the torch module."""
    from runtime.report import MSIT_COLUMNS
    stored = io.StringIO()
    rows = csv.DictWriter(stored, MSIT_COLUMNS, restval="", lineterminator="\n")
    rows.writeheader()
    for node in nodes:
        m = node.measures
        (mean, std), (golden_mean, golden_std) = m["moments"]
        rows.writerow({"Index": node.index, "OpType": node.operator, "NPUDump": node.name, "DataType": "float32",
                       "GroundTruth": node.module, "TensorIndex": node.output, "Shape": m["shape"],
                       "Overflow": "YES" if m["nonfinite"] else "NO", "CosineSimilarity": m["cosine_min"],
                       "MaxAbsoluteError": m["max_abs"], "AccumulatedRelativeError": m["accumulated"],
                       "RelativeEuclideanDistance": distance(node), "KullbackLeiblerDivergence": m["kl"],
                       "StandardDeviation": f"({mean:.6g};{std:.6g}),({golden_mean:.6g};{golden_std:.6g})",
                       "MeanAbsoluteError": m["mean_abs"], "RootMeanSquareError": m["rmse"],
                       "MaxRelativeError": m["max_relative"], "MeanRelativeError": m["mean_relative"], "IsNpuOps": "NO",
                       "IsOutputNode": "YES" if node is nodes[-1] else "NO",
                       "IsPrecisionError": "NO" if passes(node, limit) else "YES"})
    return stored.getvalue()


if __name__ == "__main__":
    sys.exit(run_command(main))
