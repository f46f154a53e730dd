"""One encoder from the inside. Takes checked options, returns a comparison per node."""

import tempfile
from pathlib import Path

import numpy as np

from convert.verify.images import verification_images
from models import family_of
from models.files import new_file
from runtime.common.errors import ToolkitError

from .comparison import NodeComparison
from .graph import compare_graph
from .modules import compare_towers, record_modules
from .om_dump import compare_dump


def save_input(inputs: dict[str, np.ndarray], path: Path):
    """The encoder's input as .npy; several as .npz, under their names."""
    suffix = ".npy" if len(inputs) == 1 else ".npz"
    with new_file(path if path.suffix == suffix else Path(f"{path}{suffix}")) as stream:
        if len(inputs) == 1:
            np.save(stream, *inputs.values())
        else:
            np.savez(stream, **inputs)


def compare_nodes(options) -> list[NodeComparison]:
    """In the order of computation. `options`: NodesOptions of `__main__`.

    ToolkitError when nothing can be compared.
    """
    family = family_of(options.model)
    if family.vision is None:
        raise ToolkitError(
            f"{family.name} is a text model; python -m runtime.compare compares its layers"
        )
    picture = family.pixels(options.image or verification_images()["scene"])
    inputs = family.encoder_inputs([picture])
    if options.save_input:
        path = Path(options.save_input)
        save_input(inputs, path)
    if options.dump:
        return compare_dump(Path(options.artifact), Path(options.dump), inputs)
    with tempfile.TemporaryDirectory(prefix="ascend-vlm-") as temporary:
        work_dir = Path(temporary)
        shapes = record_modules(family, inputs, work_dir)
        if options.candidate:
            return compare_towers(family_of(options.candidate), inputs, work_dir, shapes)
        return compare_graph(family, Path(options.artifact), inputs, work_dir, shapes)
