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


def compare_nodes(options) -> list[NodeComparison]:
    """In the order of computation. `options`: NodesOptions of `__main__`.

    ToolkitError when nothing can be compared.
    """
    family = family_of(options.model)
    if family.vision is None:
        raise ToolkitError(
            f"{family.name} is a text model; python -m runtime.compare compares its layers"
        )
    pixels = family.pixels(options.image or verification_images()["scene"])
    if options.save_input:
        path = Path(options.save_input)
        with new_file(path if path.suffix == ".npy" else Path(f"{path}.npy")) as stream:
            np.save(stream, pixels)
    if options.dump:
        return compare_dump(Path(options.artifact), Path(options.dump), pixels)
    with tempfile.TemporaryDirectory(prefix="ascend-vlm-") as temporary:
        work_dir = Path(temporary)
        shapes = record_modules(family, pixels, work_dir)
        if options.candidate:
            return compare_towers(family_of(options.candidate), pixels, work_dir, shapes)
        return compare_graph(family, Path(options.artifact), pixels, work_dir, shapes)
