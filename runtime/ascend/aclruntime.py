"""One .om on one NPU, through ais_bench over aclruntime: takes arrays, returns arrays.

Three generations of that interface are in use (2023, 0.0.2 of 2024, 2026); what differs is looked
up on the session, never read from a version. All of them check nothing but the number of bytes, so
shapes and types are checked here, and every call is made in one thread (acl_thread.py).
"""

import sys
import weakref
from pathlib import Path

import numpy as np

from runtime.common.errors import CHECK_FAILED, MISSING_COMPONENT, ToolkitError

from .acl_thread import AclThread, Printed, captured_stdout
from .host import install_ais_bench

# aclDataType -> what we feed
DTYPES = {0: np.dtype(np.float32), 1: np.dtype(np.float16), 4: np.dtype(np.uint8)}
LOADING_ADVICE = (
    "; an .om runs on the chip it was built for, with the same or a newer CANN: "
    "`python -m runtime.doctor` shows both"
)


class OmModel:
    """An .om with one input and fixed or --dynamic_batch_size batch.

    input_shape, output_shape: as the file declares them, -1 for a batch in gears.
    input_dtype, output_dtype: numpy dtypes. gears: batch sizes it can run, ascending.
    npu_seconds: time of the last run on the NPU, without the copies.
    """

    def __init__(self, path: str | Path, device_id: int = 0, output_name: str | None = None):
        self.path = Path(path)
        self.device_id = device_id
        self.npu_seconds = 0.0
        if not self.path.is_file():
            problem = "is a folder" if self.path.is_dir() else "does not exist"
            raise ToolkitError(f"{path} {problem}; give an .om file")
        session_class = infer_session()
        self._thread = AclThread()
        self._session = self._call("be loaded", session_class, device_id, str(self.path.absolute()))
        self._release = weakref.finalize(self, _release, self._thread, self._session)  # at exit too
        try:
            self._describe(output_name)
        except BaseException:
            self.close()
            raise

    def run(self, array: np.ndarray) -> np.ndarray:
        """[b, ...] -> [b, ...] in the file's own types, b one of `gears`. ToolkitError for
        anything else."""
        self._check(array)
        output = self._call("run", self._infer, array)
        wanted = (len(array), *self.output_shape[1:])
        if output.dtype != self.output_dtype or output.shape != wanted:
            raise ToolkitError(
                f"{self.path} gave {output.dtype} {list(output.shape)} where it declares "
                f"{self.output_dtype} {list(wanted)}; make it again with `python -m convert`",
                CHECK_FAILED,
            )
        return output

    def close(self):
        """Unload the model and give its device memory back; it cannot run any more."""
        self._release()

    def _describe(self, output_name):
        inputs, outputs = self._call("be read", self._tensors)
        if len(inputs) != 1:
            raise ToolkitError(
                f"{self.path} has {len(inputs)} inputs ({', '.join(inputs)}); a vision encoder has "
                "one"
            )
        [(self.input_name, (self.input_shape, self.input_dtype, size))] = inputs.items()
        names = list(outputs)
        self._output = self._choose(names, output_name)
        self.output_shape, self.output_dtype, _ = outputs[names[self._output]]
        self.gears = self._find_gears(size)

    def _tensors(self):
        return _tensors(self._session.get_inputs()), _tensors(self._session.get_outputs())

    def _choose(self, names, wanted) -> int:
        """Index of the output `wanted`: ATC names it <node>:<index>:<name in the ONNX>."""
        found = [i for i, name in enumerate(names) if name.rsplit(":", 1)[-1] == wanted]
        if len(names) == 1:
            found = [0]
        if len(found) != 1:
            raise ToolkitError(
                f"{self.path} has the outputs {', '.join(names)}, none of them is {wanted!r}; convert it "
                "from an ONNX with one output"
            )
        return found[0]

    def _find_gears(self, largest_bytes) -> tuple[int, ...]:
        """Batch sizes it can run, ascending; `largest_bytes`: size of its largest input.

        aclruntime does not list them, but rejects unsupported ones: every size is tried.
        """
        batch, *rest = self.input_shape
        if min(rest, default=0) < 1:
            raise ToolkitError(
                f"{self.path} takes inputs of changing size {list(self.input_shape)}; convert it with a "
                "fixed --input_shape, or with --dynamic_batch_size"
            )
        if batch > 0:
            return (batch,)
        image_bytes = int(np.prod(rest)) * self.input_dtype.itemsize
        gears = []
        for size in range(1, largest_bytes // image_bytes + 1):
            if self._call("be asked for its gears", self._accepts, size):
                gears.append(size)
        if not gears:
            raise ToolkitError(
                f"{self.path} has a dynamic batch but accepts no batch size; convert it with "
                "--dynamic_batch_size, e.g. 1,2,4"
            )
        return tuple(gears)

    def _accepts(self, batch) -> bool:
        try:
            return not self._session.set_dynamic_batchsize(batch)
        except RuntimeError:
            return False

    def _check(self, array):
        batch = self.input_shape[0]
        if batch < 0 and array.ndim:
            batch = len(array)
        wanted = (batch, *self.input_shape[1:])
        if array.dtype != self.input_dtype or array.shape != wanted:
            raise ToolkitError(
                f"{self.path} takes {self.input_dtype} {list(wanted)}, got {array.dtype} "
                f"{list(array.shape)}"
            )
        if batch not in self.gears:
            raise ToolkitError(
                f"{self.path} has no gear for a batch of {batch}; it has "
                f"{', '.join(map(str, self.gears))}"
            )
        if not array.flags.c_contiguous:
            raise ToolkitError(
                f"{self.path} got an array that is not contiguous; copy it with "
                "numpy.ascontiguousarray"
            )

    def _infer(self, array) -> np.ndarray:
        session = self._session
        geared = self.input_shape[0] < 0
        if geared:
            session.set_dynamic_batchsize(len(array))  # 2023's infer does not do it
        [expected] = [desc.realsize for desc in session.get_inputs()]
        if array.nbytes != expected:
            raise RuntimeError(f"it wants {expected:,} bytes, {array.nbytes:,} were given")
        output = session.infer([array], mode="dymbatch" if geared else "static")[self._output]
        self._note_time(session)
        return output

    def _note_time(self, session):
        self.npu_seconds = _last_run(session) / 1000

    def _call(self, doing, function, *arguments):
        """function(*arguments) in aclruntime's thread.

        ToolkitError: "... cannot {doing} (the library's reason)".
        """
        try:
            return self._thread.call(function, *arguments)
        except ToolkitError:
            raise
        # the generations raise RuntimeError, ValueError, TypeError and OSErrors
        except Exception as error:
            reason = self._thread.reason(error)
            advice = LOADING_ADVICE if doing == "be loaded" else ""
            raise ToolkitError(
                f"{self.path} cannot {doing} on npu:{self.device_id} ({reason}){advice}; "
                "--vision onnx works without it"
            ) from error


def infer_session() -> type:
    """ais_bench's InferSession. ToolkitError (exit 3) with the command that installs what is
    missing."""
    try:
        with captured_stdout(Printed()):
            from ais_bench.infer.interface import InferSession
    except ModuleNotFoundError as error:
        raise ToolkitError(
            f"vision om needs {error.name}, which is not installed and not on PyPI; run "
            f"`{install_ais_bench()}`, or use --vision onnx",
            MISSING_COMPONENT,
        ) from None
    except (ImportError, OSError) as error:
        raise ToolkitError(
            f"aclruntime cannot be imported ({error}); run `source set_env.sh` of the CANN toolkit "
            "in this shell, `python -m runtime.doctor` shows where it is",
            MISSING_COMPONENT,
        ) from None
    return InferSession


def _tensors(descriptions) -> dict[str, tuple]:
    """{name: (shape, numpy dtype, bytes of the largest gear)}. ToolkitError for a type we do not
    feed."""
    found = {}
    for desc in descriptions:
        if int(desc.datatype) not in DTYPES:
            raise ToolkitError(
                f"{desc.name} of the .om has data type {desc.datatype}; float32, float16 and uint8 "
                "are understood: convert it with --output_type=FP16"
            )
        found[desc.name] = (tuple(desc.shape), DTYPES[int(desc.datatype)], desc.size)
    return found


def _last_run(session) -> float:
    """Milliseconds of the last run on the NPU, and forget it: 2023 lists numbers, later generations
    (start, end)."""
    summary = getattr(session, "summary", None) or session.sumary
    times = list(summary().exec_time_list)
    reset = getattr(session, "reset_summaryinfo", None) or session.reset_sumaryinfo
    reset()
    last = times[-1] if times else 0.0
    return last if isinstance(last, float) else last[1] - last[0]


def _release(thread: AclThread, session):
    """Unload in the thread that loaded.

    Without torch_npu the context goes too. With it the context may be torch_npu's own (2026 adopts
    it), so only the model is dropped, whose destructor unloads it and frees its memory.
    """

    def unload():
        free = getattr(session.session, "free_resource", None)
        if free and "torch_npu" not in sys.modules:
            free()
        session.session = None

    thread.call(unload)
    thread.stop()
