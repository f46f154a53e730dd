"""Verification of an exported encoder: ONNX Runtime against the family's own module in torch.

Takes a checkpoint and a directory with vision.onnx, returns one Comparison per image. Names, shapes
and dtypes are compared first, then the values of all elements.
"""

import json
from pathlib import Path

import onnx

from models import family_of
from models.checkpoint import Checkpoint
from models.family import Family
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.machine import available_memory, gib
from runtime.common.processes import output_of
from runtime.common.progress import step_progress
from runtime.vision.artifact import ONNX

from .comparison import Comparison, compare
from .images import verification_pictures
from .pieces import memory_needed
from .preflight import interface_findings
from .streamed_graph import StreamedGraph
from .streamed_tower import StreamedTower


def verify(family: Family, onnx_dir: Path) -> dict[str, Comparison]:
    """`measure` in a child process (`python -m convert.verify`), because neither torch nor ONNX
    Runtime gives memory back. The child opens family and checkpoint again from their directory.

    ToolkitError when memory is short or the child fails.
    """
    needed = memory_needed(onnx.load(onnx_dir / ONNX, load_external_data=False).graph)
    available = available_memory()
    if needed > available:
        raise ToolkitError(
            f"verifying {family.name}'s encoder needs {gib(needed)} GiB of memory, only "
            f"{gib(available)} are free; free some and run the same command again"
        )
    code, output = output_of("convert.verify", family.directory.resolve(), onnx_dir.resolve())
    if code:
        what = "was killed, perhaps for lack of memory" if code < 0 else "failed"
        raise ToolkitError(
            f"the verification of {onnx_dir} {what}; run the same command again", CHECK_FAILED
        )
    return {name: Comparison(**values) for name, values in json.loads(output).items()}


def measure(model_dir: str | Path, onnx_dir: str | Path) -> dict[str, Comparison]:
    """{image: Comparison}. ToolkitError when names, shapes or dtypes differ already."""
    family = family_of(model_dir)
    tower = StreamedTower(family, Checkpoint(model_dir))
    graph = StreamedGraph(Path(onnx_dir))
    for finding in interface_findings(graph.model.graph, family.vision):
        raise ToolkitError(str(finding), CHECK_FAILED)
    pictures = verification_pictures(family)
    inputs = [family.encoder_inputs([picture]) for picture in pictures.values()]
    with step_progress("verifying: torch", len(inputs) * tower.steps) as tower.advance:
        references = list(map(tower.run, inputs))
    with step_progress("verifying: ONNX Runtime", graph.steps) as graph.advance:
        candidates = graph.run(inputs)
    return dict(zip(pictures, map(compare, references, candidates)))
