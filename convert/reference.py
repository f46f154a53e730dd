"""Features of the verification pictures by ONNX Runtime, in a process of its own (it does not give memory back).

In flows an artifact folder, out flow arrays: `plain` from vision.onnx, what an .om is measured against, and, for a
graph made for ATC, `variant` from it.
"""
import ctypes
import io
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from models.base import Family
from runtime.errors import CHECK_FAILED, ToolkitError

from .verify import PR_SET_PDEATHSIG, pictures


def pixels(family: Family) -> np.ndarray:
    """float32 [pictures, S, S, 3], raw 0..255."""
    return np.concatenate([family.pixels(picture) for picture in pictures().values()])


def features(family: Family, out: Path, variant: Path | None = None, aipp: Path | None = None) -> dict[str, np.ndarray]:
    """{"plain", "variant"}: float32 [pictures, rows, hidden]; `aipp` = config of the arithmetic in front of `variant`."""
    from runtime.artifact import start_module
    arguments = [family.directory.resolve(), out.resolve(), *(path.resolve() for path in (variant, aipp) if path)]
    with start_module("convert.reference", *arguments, stdout=subprocess.PIPE, start_new_session=True) as process:
        try:
            output, _ = process.communicate()
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        raise ToolkitError(f"ONNX Runtime could not compute the reference features of {out} (see above); free some memory "
                           "and run the same command again", CHECK_FAILED)
    with np.load(io.BytesIO(output)) as arrays:
        return dict(arrays)


def compute(directory: str, out: str, variant: str | None = None, aipp: str | None = None) -> dict[str, np.ndarray]:
    import onnxruntime

    from models import family_of
    from runtime.vision import OnnxVision

    from .variant import apply_aipp
    family = family_of(directory)
    raw = pixels(family)
    result = {"plain": OnnxVision(Path(out), family.vision).encode(raw)}
    if variant:
        session = onnxruntime.InferenceSession(variant, providers=["CPUExecutionProvider"])
        values = apply_aipp(Path(aipp).read_text(encoding="ascii"), raw) if aipp else raw
        fixed = isinstance(session.get_inputs()[0].shape[0], int)
        batches = [value[None] for value in values] if fixed else [values]
        result["variant"] = np.concatenate([session.run(None, {family.vision.input_name: b})[0] for b in batches])
    return result


def main(argv: list[str]) -> int:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)       # nothing goes on when the converter is killed
    stream = io.BytesIO()
    np.savez(stream, **compute(*argv))
    sys.stdout.buffer.write(stream.getvalue())
    return 0


if __name__ == "__main__":
    from runtime.errors import run_command
    sys.exit(run_command(main))
