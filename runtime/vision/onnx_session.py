"""The exported vision encoder in ONNX Runtime: takes images as float32, returns features as
float32."""

from pathlib import Path

from models.config import VisionSpec
from models.files import native_path
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.threads import usable

from .artifact import ONNX
from .session import VisionSession


def session_options(threads: int | None = None):
    """onnxruntime.SessionOptions of every graph that we run on the CPU: as many threads as this
    process may use, none of which spins while it waits, and no warnings."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or usable()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def load_graph(directory, threads: int | None = None):
    """onnxruntime.InferenceSession of an artifact's graph. ToolkitError when it cannot be
    loaded."""
    import onnxruntime

    try:
        with native_path(directory / ONNX) as name:
            return onnxruntime.InferenceSession(
                name, session_options(threads), ["CPUExecutionProvider"]
            )
    except Exception as error:  # onnxruntime raises plain Exceptions of its own
        reason = str(error).strip().splitlines()[0]
        raise ToolkitError(
            f"{directory / ONNX} cannot be loaded ({reason}); convert it again with --force"
        ) from error


def described(directory: Path, verified: bool) -> str:
    """The line for the user about a graph that ONNX Runtime runs."""
    import onnxruntime

    text = f"vision: onnxruntime {onnxruntime.__version__} CPU, fp32, artifact {directory}"
    return text if verified else f"{text}, not compared with torch"


class OnnxVision(VisionSession):
    """The exported graph in ONNX Runtime on the CPU, in fp32."""

    stage = "ONNX vision encoder"

    def __init__(
        self, directory: Path, spec: VisionSpec, threads: int | None = None, verified: bool = True
    ):
        """directory: an artifact's. threads: None = as many as this process may use. verified:
        whether the artifact was compared with torch. ToolkitError when the graph cannot be
        loaded."""
        super().__init__(spec)
        self.directory = directory
        self.unverified = None if verified else directory
        self.session = load_graph(directory, threads)

    def _encode(self, pixels):
        try:
            return self.session.run([self.spec.output_name], {self.spec.input_name: pixels})[0]
        except Exception as error:  # another input than the family's, no memory
            reason = str(error).strip().splitlines()[0]
            raise ToolkitError(
                f"{self.directory / ONNX} cannot be computed ({reason}); convert it again with --force",
                CHECK_FAILED,
            ) from error

    def describe(self):
        return described(self.directory, self.unverified is None)
