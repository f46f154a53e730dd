"""A tower's modules. Takes a family and the encoder's inputs, records the result of every module in a file, or
compares another checkpoint's modules with the recorded ones.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import nn

from convert.verify.streamed_tower import StreamedTower
from models.checkpoint import Checkpoint
from models.family import Family
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.progress import step_progress

from .comparison import NodeComparison, measure


def run_modules(
    family: Family,
    inputs: dict[str, np.ndarray],
    on_result: Callable[[str, nn.Module, np.ndarray], None],
):
    """Run the tower in torch; on_result(path, module, array) is called when a module is done."""
    streamed = StreamedTower(family, Checkpoint(family.directory))
    for path, module in streamed.tower.named_modules():
        if path:

            def hook(module, _, output, path=path):
                on_result(path, module, output.numpy())

            module.register_forward_hook(hook)
    with step_progress(f"torch: {family.directory}", streamed.steps) as streamed.advance:
        streamed.run(inputs)


def record_modules(
    family: Family, inputs: dict[str, np.ndarray], work_dir: Path
) -> dict[str, tuple]:
    """Write every module's result to `work_dir`/PATH.npy.

    Returns {path: shape} of the modules that are called once.
    """
    calls = Counter()
    shapes = {}

    def save(path, module, output):
        calls[path] += 1
        shapes[path] = output.shape
        np.save(work_dir / f"{path}.npy", output)

    run_modules(family, inputs, save)
    return {path: shape for path, shape in shapes.items() if calls[path] == 1}


def compare_towers(
    family: Family, inputs: dict[str, np.ndarray], work_dir: Path, shapes: dict[str, tuple]
) -> list[NodeComparison]:
    """Another checkpoint's modules against the recorded ones of equal path and shape.

    ToolkitError if there are none.
    """
    nodes = []

    def compare(path, module, output):
        if shapes.get(path) == output.shape:
            measures = measure(np.load(work_dir / f"{path}.npy"), output)
            node = NodeComparison(
                index=len(nodes),
                candidate=path,
                operator=type(module).__name__,
                output="",
                golden=path,
                shape=output.shape,
                measures=measures,
            )
            nodes.append(node)

    run_modules(family, inputs, compare)
    if not nodes:
        raise ToolkitError(
            f"{family.directory} has no module in common with the reference; give two checkpoints of one model",
            CHECK_FAILED,
        )
    return nodes
