"""Golden features: what ONNX Runtime computes for the verification images.

Takes a graph (vision.onnx, or the variant made for ATC), returns the features that an .om is
measured against. Computed in a child process (`python -m convert.atc.golden_features`), because
ONNX Runtime gives no memory back.
"""

import functools
import io
import sys
from pathlib import Path

import numpy as np

from convert.verify.images import verification_pictures
from convert.verify.streamed_graph import StreamedGraph
from models import family_of
from models.family import Family
from models.files import native_path
from runtime.common.errors import CHECK_FAILED, ToolkitError, run_command
from runtime.common.processes import die_with_parent, output_of
from runtime.vision.artifact import ONNX
from runtime.vision.onnx_session import session_options

from .aipp import apply_aipp


@functools.lru_cache(maxsize=1)
def golden(family: Family, artifact_dir: Path) -> np.ndarray:
    """Features of vision.onnx, which its variant and every .om are compared with; computed once."""
    return features(family, artifact_dir / ONNX)


def features(family: Family, graph: Path, aipp: Path | None = None) -> np.ndarray:
    """float32 [rows of all images, hidden]. `aipp`: the AIPP file to apply in front of `graph`, if any.

    ToolkitError when ONNX Runtime cannot run the graph.
    """
    paths = [family.directory, graph]
    if aipp:
        paths.append(aipp)
    absolute = [path.resolve() for path in paths]
    code, output = output_of("convert.atc.golden_features", *absolute)
    if code:
        raise ToolkitError(
            f"ONNX Runtime could not run {graph}; free some memory and run the same command again",
            CHECK_FAILED,
        )
    return np.load(io.BytesIO(output))


def compute(model_dir: str, graph: str, aipp: str | None = None) -> np.ndarray:
    """`features` in this process; vision.onnx itself with a part of its weights in memory."""
    import onnxruntime

    family = family_of(model_dir)
    pictures = list(verification_pictures(family).values())
    if Path(graph).name == ONNX:
        inputs = [family.encoder_inputs([picture]) for picture in pictures]
        rows = StreamedGraph(Path(graph).parent).run(inputs)
        return np.concatenate(rows).reshape(-1, family.decoder.hidden)
    if aipp:
        text = Path(aipp).read_text(encoding="ascii")
        pictures = [apply_aipp(text, pixels) for pixels in pictures]
    with native_path(graph) as name:
        session = onnxruntime.InferenceSession(name, session_options(), ["CPUExecutionProvider"])
    if isinstance(session.get_inputs()[0].shape[0], int):
        groups = [[picture] for picture in pictures]
    else:  # a free batch, or pictures of any size, are tried with all at once
        groups = [pictures]
    rows = [session.run(None, family.encoder_inputs(group))[0] for group in groups]
    return np.concatenate(rows).reshape(-1, family.decoder.hidden)


def main(argv: list[str]) -> int:
    die_with_parent()
    stream = io.BytesIO()
    np.save(stream, compute(*argv))
    sys.stdout.buffer.write(stream.getvalue())
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
