"""Proof of an exported encoder: ONNX Runtime against the family's own torch module in fp32, on two pictures.

In flows a checkpoint and a folder with vision.onnx, out flows one Comparison per picture. Compared in order: names,
shapes, dtypes, then values over all elements. Run as a process of its own (`python -m convert.verify`), because neither
torch nor ONNX Runtime gives memory back.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from models.family import Family
from runtime.common.errors import CHECK_FAILED, ToolkitError

from .comparison import Comparison, compare
from .pictures import pictures


def verify(family: Family, directory: Path, folder: Path) -> dict[str, Comparison]:
    """Run `measure` in a child process. ToolkitError when memory is short or the child dies."""
    from runtime.common.machine import available_memory, gib
    from runtime.common.processes import output_of

    from .piecewise import memory_needed

    need = memory_needed(folder)
    if need > available_memory():
        raise ToolkitError(
            f"verifying {family.name}'s encoder needs {gib(need)} GiB of memory, only "
            f"{gib(available_memory())} are free; free some and run the same command again"
        )
    code, output = output_of("convert.verify", directory.resolve(), folder.resolve())
    if code:
        why = "was killed, perhaps for lack of memory" if code < 0 else "failed"
        raise ToolkitError(
            f"the verification of {folder} {why}; run the same command again", CHECK_FAILED
        )
    return {name: Comparison(**values) for name, values in json.loads(output).items()}


def measure(directory: str, folder: str) -> dict[str, Comparison]:
    """Comparison of every picture. ToolkitError when names, shapes or dtypes differ already."""
    from models import family_of
    from models.checkpoint.reader import Checkpoint
    from runtime.common.progress import step_progress

    from .piecewise import StreamedGraph, StreamedTower
    from .preflight import interface

    family = family_of(directory)
    pixels = {name: family.pixels(picture) for name, picture in pictures().items()}
    tower = StreamedTower(family, Checkpoint(directory))
    graph = StreamedGraph(Path(folder))
    for finding in interface(graph.model.graph, family.vision):
        raise ToolkitError(str(finding), CHECK_FAILED)
    with step_progress("verifying: torch", len(pixels) * tower.steps) as tower.advance:
        references = [tower.run(array) for array in pixels.values()]
    with step_progress("verifying: ONNX Runtime", graph.steps) as graph.advance:
        candidates = graph.run(list(pixels.values()))
    return {name: compare(*both) for name, *both in zip(pixels, references, candidates)}


def main(argv: list[str]) -> int:
    from runtime.common.processes import die_with_parent

    die_with_parent()
    print(json.dumps({name: asdict(result) for name, result in measure(*argv).items()}))
    return 0


if __name__ == "__main__":
    from runtime.common.errors import run_command

    sys.exit(run_command(main))
