"""Proof of an exported encoder: ONNX Runtime against the family's own torch module in fp32, on two pictures.

In flows a checkpoint and a folder with vision.onnx, out flows one Comparison per picture. Compared in order: names,
shapes, dtypes, then values over all elements. Run as a process of its own (`python -m convert.verify`), because neither
torch nor ONNX Runtime gives memory back.
"""
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from models.family import Family
from runtime.common.errors import CHECK_FAILED, ToolkitError

COSINE, RELATIVE = 0.999999, 1e-4       # lowest cosine; highest error relative to the largest value (measured: 1e-6)


@dataclass
class Comparison:
    """ONNX Runtime against torch on one picture; errors are absolute, over all `elements`."""
    cosine: float
    max_abs: float
    mean_abs: float
    reference_max: float
    elements: int

    @property
    def passed(self) -> bool:
        """False for NaN, Inf and for nothing compared."""
        return bool(self.elements and self.cosine >= COSINE and self.max_abs <= RELATIVE * self.reference_max)

    def __str__(self):
        return (f"cosine {self.cosine:.9f}, max abs {self.max_abs:.3g}, mean abs {self.mean_abs:.3g} "
                f"(largest value {self.reference_max:.3g}, {self.elements} elements)")


def compare(reference: np.ndarray, candidate: np.ndarray) -> Comparison:
    """Two arrays of the same shape -> Comparison, in float64. ToolkitError when the shapes differ."""
    if reference.shape != candidate.shape:
        raise ToolkitError(f"output shapes differ: torch {list(reference.shape)}, ONNX {list(candidate.shape)}",
                           CHECK_FAILED)
    a, b = reference.astype(np.float64).ravel(), candidate.astype(np.float64).ravel()
    if not a.size or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Comparison(0.0, float("inf"), float("inf"), 0.0, 0)
    difference = np.abs(a - b)
    norms = np.linalg.norm(a) * np.linalg.norm(b)
    return Comparison(float(a @ b / norms) if norms else float(np.array_equal(a, b)), float(difference.max()),
                      float(difference.mean()), float(np.abs(a).max()), a.size)


def pictures(size: int = 448) -> dict:
    """Two PIL pictures, always the same: "scene" (gradients, shapes, texture, like a photo) and "noise"."""
    from PIL import Image, ImageDraw, ImageFilter
    rng = np.random.default_rng(7)
    y, x = np.mgrid[:size, :size] / size
    sky = np.stack([120 + 100 * x, 150 + 60 * y, 230 - 150 * y], axis=-1)
    scene = Image.fromarray(sky.astype(np.uint8))
    draw = ImageDraw.Draw(scene)
    for _ in range(12):
        corner, extent = rng.integers(0, size, 2), rng.integers(size // 16, size // 3, 2)
        box = [*map(int, corner), *map(int, corner + extent)]
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(box, fill=tuple(map(int, rng.integers(0, 256, 3))))
    texture = rng.normal(0, 12, (size, size, 1))
    soft = np.asarray(scene.filter(ImageFilter.GaussianBlur(1.5)), np.float64)
    noise = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    return {"scene": Image.fromarray(np.clip(soft + texture, 0, 255).astype(np.uint8)), "noise": Image.fromarray(noise)}


def verify(family: Family, directory: Path, folder: Path) -> dict[str, Comparison]:
    """Run `measure` in a child process. ToolkitError when memory is short or the child dies."""
    from runtime.common.processes import output_of
    from runtime.plan.__main__ import available_memory, gib

    from .piecewise import memory_needed
    need = memory_needed(folder)
    if need > available_memory():
        raise ToolkitError(f"verifying {family.name}'s encoder needs {gib(need)} GiB of memory, only "
                           f"{gib(available_memory())} are free; free some and run the same command again")
    code, output = output_of("convert.verify", directory.resolve(), folder.resolve())
    if code:
        why = "was killed, perhaps for lack of memory" if code < 0 else "failed"
        raise ToolkitError(f"the verification of {folder} {why}; run the same command again", CHECK_FAILED)
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
    tower, graph = StreamedTower(family, Checkpoint(directory)), StreamedGraph(Path(folder))
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
