"""Features of the verification pictures by ONNX Runtime, in a process of its own (it does not give memory back).

In flows a graph (vision.onnx, or what was made of it for ATC), out flow the features that an .om is measured against.
"""

import io
import sys
from pathlib import Path

import numpy as np

from convert.verify.pictures import pictures
from models.family import Family
from runtime.common.errors import CHECK_FAILED, ToolkitError


def pixels(family: Family) -> np.ndarray:
    """float32 [pictures, S, S, 3], raw 0..255."""
    return np.concatenate([family.pixels(picture) for picture in pictures().values()])


def features(family: Family, graph: Path, aipp: Path | None = None) -> np.ndarray:
    """float32 [pictures, rows, hidden]; `aipp` = file of the arithmetic in front of `graph`, if there is any."""
    from runtime.common.processes import output_of

    code, output = output_of(
        "convert.atc.golden_features",
        *(path.resolve() for path in (family.directory, graph, aipp) if path),
    )
    if code:
        raise ToolkitError(
            f"ONNX Runtime could not run {graph}; free some memory and run the same command again",
            CHECK_FAILED,
        )
    return np.load(io.BytesIO(output))


def compute(directory: str, graph: str, aipp: str | None = None) -> np.ndarray:
    import onnxruntime

    from models import family_of

    from .graph_variant import apply_aipp

    family = family_of(directory)
    values = pixels(family)
    if aipp:
        values = apply_aipp(Path(aipp).read_text(encoding="ascii"), values)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    batches = [values[i : i + 1] for i in range(len(values))]
    if not isinstance(
        session.get_inputs()[0].shape[0], int
    ):  # a free batch is tried with all pictures at once
        batches = [values]
    return np.concatenate(
        [session.run(None, {family.vision.input_name: batch})[0] for batch in batches]
    )


def main(argv: list[str]) -> int:
    from runtime.common.processes import die_with_parent

    die_with_parent()
    stream = io.BytesIO()
    np.save(stream, compute(*argv))
    sys.stdout.buffer.write(stream.getvalue())
    return 0


if __name__ == "__main__":
    from runtime.common.errors import run_command

    sys.exit(run_command(main))
