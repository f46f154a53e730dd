"""The exported vision encoder in ONNX Runtime: takes images as float32, returns features as
float32."""

from pathlib import Path

import numpy as np

from models.config import VisionSpec
from models.files import native_path
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.threads import usable

from .artifact import ONNX
from .session import FixedSizeSession


def session_options(threads: int | None = None):
    """onnxruntime.SessionOptions of every graph that we run on the CPU: as many threads as this
    process may use, none of which spins while it waits, and no warnings."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or usable()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


class OnnxGraph:
    """An artifact's graph in ONNX Runtime on the CPU. threads: None = as many as this process may
    use. verified: whether the artifact was compared with torch."""

    def __init__(self, directory: Path, output_name: str, threads: int | None, verified: bool):
        """ToolkitError when the graph cannot be loaded."""
        import onnxruntime

        self.directory = directory
        self.output_name = output_name
        self.unverified = None if verified else directory
        self.version = onnxruntime.__version__
        try:
            with native_path(directory / ONNX) as name:
                self.session = onnxruntime.InferenceSession(
                    name, session_options(threads), ["CPUExecutionProvider"]
                )
        except Exception as error:  # onnxruntime raises plain Exceptions of its own
            raise self._problem("loaded", error) from error

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """{name: array} of all inputs -> the output. ToolkitError (exit 1) when it cannot be
        computed: another input than the family's, no memory."""
        try:
            return self.session.run([self.output_name], inputs)[0]
        except Exception as error:
            raise self._problem("computed", error, CHECK_FAILED) from error

    def describe(self) -> str:
        """The line for the user."""
        text = f"vision: onnxruntime {self.version} CPU, fp32, artifact {self.directory}"
        return f"{text}, not compared with torch" if self.unverified else text

    def _problem(self, doing: str, error: Exception, *exit_code: int) -> ToolkitError:
        reason = str(error).strip().splitlines()[0]
        return ToolkitError(
            f"{self.directory / ONNX} cannot be {doing} ({reason}); convert it again with --force",
            *exit_code,
        )


class OnnxVision(FixedSizeSession):
    """The exported graph in ONNX Runtime on the CPU, in fp32."""

    stage = "ONNX vision encoder"

    def __init__(
        self, directory: Path, spec: VisionSpec, threads: int | None = None, verified: bool = True
    ):
        """As OnnxGraph; directory: an artifact's."""
        super().__init__(spec)
        self.graph = OnnxGraph(directory, spec.output_name, threads, verified)
        self.unverified = self.graph.unverified

    def _encode(self, pixels):
        return self.graph.run({self.spec.input_name: pixels})

    def describe(self):
        return self.graph.describe()
