"""Outputs of a tower's modules, recorded and compared."""

from collections import Counter
from pathlib import Path

from runtime.common.errors import CHECK_FAILED, ToolkitError

from .node import Node, measure


def watch(family, pixels, see):
    """Run the tower in torch; see(path, module, array) for every module's result, the inner ones first."""
    from convert.verify.piecewise import StreamedTower
    from models.checkpoint.reader import Checkpoint
    from runtime.common.progress import step_progress

    tower = StreamedTower(family, Checkpoint(family.directory))
    for path, module in tower.tower.named_modules():
        if path:
            module.register_forward_hook(
                lambda module, _, output, path=path: see(path, module, output.numpy())
            )
    with step_progress(f"torch: {family.directory}", tower.steps) as tower.advance:
        tower.run(pixels)


def record(family, pixels, work: Path) -> dict[str, tuple]:
    """The result of every module that is called once goes to a file. {module path: shape}."""
    import numpy as np

    calls = Counter()
    shapes = {}

    def keep(path, module, output):
        calls[path] += 1
        shapes[path] = output.shape
        np.save(work / f"{path}.npy", output)

    watch(family, pixels, keep)
    return {path: shape for path, shape in shapes.items() if calls[path] == 1}


def compare_towers(family, pixels, work: Path, shapes: dict[str, tuple]) -> list[Node]:
    """Another checkpoint's modules against the recorded ones."""
    import numpy as np

    nodes = []

    def see(path, module, output):
        if shapes.get(path) == output.shape:
            measures = measure(np.load(work / f"{path}.npy"), output)
            nodes.append(
                Node(
                    len(nodes),
                    path,
                    type(module).__name__,
                    "",
                    path,
                    output.shape,
                    measures=measures,
                )
            )

    watch(family, pixels, see)
    if not nodes:
        raise ToolkitError(
            f"{family.directory} has no module in common with the reference; give two checkpoints of one model",
            CHECK_FAILED,
        )
    return nodes
