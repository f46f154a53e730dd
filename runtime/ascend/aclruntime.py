"""One .om on one NPU, through ais_bench over aclruntime: arrays in, arrays out.

Three generations of that interface are in use (2023, 0.0.2 of 2024, 2026); what differs is looked up on the session, never
read from a version. All of them check nothing but the number of bytes, print on stdout, and bind an ACL context to the
calling thread. So shapes and types are checked here, what they print is caught and shown only as the reason of a failure,
and every call is made in one thread of its own, where torch_npu cannot change the context under aclruntime or the other
way round.
"""

import ctypes
import os
import re
import sys
import tempfile
import weakref
from concurrent.futures import Future, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from threading import Thread

import numpy as np

from runtime.common.errors import CHECK_FAILED, MISSING_COMPONENT, ToolkitError

from .host import install_ais_bench

DTYPES = {
    0: np.dtype(np.float32),
    1: np.dtype(np.float16),
    4: np.dtype(np.uint8),
}  # aclDataType -> what we feed


class OmModel:
    """An .om with one input and fixed or --dynamic_batch_size batch.

    input_shape, output_shape: as the file declares them, -1 for a batch in gears; input_dtype, output_dtype: numpy dtypes;
    gears: batch sizes it can run, ascending; npu_seconds: time of the last run on the NPU, without the copies.
    """

    def __init__(self, path: str | Path, device_id: int = 0, output_name: str | None = None):
        self.path = Path(path)
        self.device_id = device_id
        self.npu_seconds = 0.0
        if not self.path.is_file():
            raise ToolkitError(
                f"{path} {'is a folder' if self.path.is_dir() else 'does not exist'}; give an .om file"
            )
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
        """[b, ...] -> [b, ...] in the file's own types, b one of `gears`. ToolkitError for anything else."""
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
        inputs, outputs = self._call(
            "be read",
            lambda: (_tensors(self._session.get_inputs()), _tensors(self._session.get_outputs())),
        )
        if len(inputs) != 1:
            raise ToolkitError(
                f"{self.path} has {len(inputs)} inputs ({', '.join(inputs)}); a vision encoder has one"
            )
        [(self.input_name, (self.input_shape, self.input_dtype, size))] = inputs.items()
        self._output = self._choose(list(outputs), output_name)
        self.output_shape, self.output_dtype, _ = outputs[list(outputs)[self._output]]
        self.gears = self._find_gears(size)

    def _choose(self, names, wanted) -> int:
        """Index of the output `wanted`: ATC names it <node>:<index>:<name in the ONNX>."""
        found = [
            i
            for i, name in enumerate(names)
            if len(names) == 1 or name.rsplit(":", 1)[-1] == wanted
        ]
        if len(found) != 1:
            raise ToolkitError(
                f"{self.path} has the outputs {', '.join(names)}, none of them is {wanted!r}; convert it "
                "from an ONNX with one output"
            )
        return found[0]

    def _find_gears(self, largest_bytes) -> tuple[int, ...]:
        """The gears are not told, but asking for another batch is refused: try every size up to the largest."""
        batch = self.input_shape[0]
        rest = self.input_shape[1:]
        if min(rest, default=0) < 1:
            raise ToolkitError(
                f"{self.path} takes inputs of changing size {list(self.input_shape)}; convert it with a "
                "fixed --input_shape, or with --dynamic_batch_size"
            )
        if batch > 0:
            return (batch,)
        most = largest_bytes // (int(np.prod(rest)) * self.input_dtype.itemsize)
        gears = tuple(
            filter(
                lambda b: self._call("be asked for its gears", self._accepts, b), range(1, most + 1)
            )
        )
        if not gears:
            raise ToolkitError(
                f"{self.path} takes a changing batch but no gears; convert it with --dynamic_batch_size, "
                "e.g. 1,2,4"
            )
        return gears

    def _accepts(self, batch) -> bool:
        try:
            return not self._session.set_dynamic_batchsize(batch)
        except RuntimeError:
            return False

    def _check(self, array):
        batch = len(array) if array.ndim and self.input_shape[0] < 0 else self.input_shape[0]
        wanted = (batch, *self.input_shape[1:])
        if array.dtype != self.input_dtype or array.shape != wanted:
            raise ToolkitError(
                f"{self.path} takes {self.input_dtype} {list(wanted)}, got {array.dtype} "
                f"{list(array.shape)}"
            )
        if batch not in self.gears:
            raise ToolkitError(
                f"{self.path} has no gear for a batch of {batch}; it has {', '.join(map(str, self.gears))}"
            )
        if not array.flags.c_contiguous:
            raise ToolkitError(
                f"{self.path} got an array that is not contiguous; copy it with numpy.ascontiguousarray"
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
        self.npu_seconds = _last_run(session) / 1000
        return output

    def _call(self, doing, function, *arguments):
        """function(*arguments) in aclruntime's thread. ToolkitError: "... cannot {doing} (the library's reason)"."""
        try:
            return self._thread.call(function, *arguments)
        except ToolkitError:
            raise
        except (
            Exception
        ) as error:  # the generations raise RuntimeError, ValueError, TypeError and OSErrors
            advice = (
                "; an .om runs on the chip it was built for, with the same or a newer CANN: `python -m runtime.doctor` "
                "shows both"
                if doing == "be loaded"
                else ""
            )
            raise ToolkitError(
                f"{self.path} cannot {doing} on npu:{self.device_id} ({self._thread.reason(error)}){advice}; "
                "--vision onnx works without it"
            ) from error


class AclThread:
    """Runs calls one at a time in a thread of its own, with the process's stdout turned away.

    A daemon, unlike an executor's thread: it must still run when the exit handlers release what it opened.
    """

    def __init__(self):
        self._jobs = SimpleQueue()
        self._printed = ""
        self._stopped = False
        Thread(target=self._work, name="aclruntime", daemon=True).start()

    def call(self, function, *arguments):
        if self._stopped:
            raise RuntimeError("it was closed")
        future = Future()
        self._jobs.put((future, function, arguments))
        try:
            return future.result()
        except KeyboardInterrupt:
            wait([future])  # stdout comes back with the end of the call
            raise

    def reason(self, error: Exception) -> str:
        """The last error the library printed during the last call, else the exception's own text."""
        printed = re.findall(r"\[error\][ \t]*(.+)", self._printed, re.IGNORECASE)
        return "; ".join(filter(None, (str(error).strip(), *printed[-1:]))) or type(error).__name__

    def stop(self):
        self._stopped = True
        self._jobs.put(None)

    def _work(self):
        while job := self._jobs.get():
            self._do(*job)
            del job  # or it would keep a released session alive

    def _do(self, future, function, arguments):
        printed = Printed()
        try:
            with captured_stdout(printed):
                result = function(*arguments)
            future.set_result(result)
        except BaseException as error:
            self._printed = printed.text
            future.set_exception(error)


class Printed:
    text = ""


@contextmanager
def captured_stdout(printed: Printed):
    """File descriptor 1 goes to a file for a while, C's buffers included; at the end `printed.text` is what came."""
    _occupy(1)
    stdout = os.dup(1)
    libc = ctypes.CDLL(None)
    _flush(libc)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        try:
            yield
        finally:
            _flush(libc)
            os.dup2(stdout, 1)
            os.close(stdout)
            file.seek(0)
            printed.text = file.read().decode(errors="replace")


def _occupy(descriptor: int):
    """A closed descriptor becomes the null device for good, lest the next file opened be given its number."""
    try:
        os.fstat(descriptor)
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        if null != descriptor:
            os.dup2(null, descriptor)
            os.close(null)


def _flush(libc):
    with suppress(
        OSError, ValueError, AttributeError
    ):  # a reader that is gone, a closed or missing stdout
        sys.stdout.flush()
    libc.fflush(None)


def infer_session() -> type:
    """ais_bench's InferSession. ToolkitError (exit 3) with the line to install what is missing."""
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
            f"aclruntime cannot be imported ({error}); run `source set_env.sh` of the CANN toolkit in this "
            "shell, `python -m runtime.doctor` shows where it is",
            MISSING_COMPONENT,
        ) from None
    return InferSession


def _tensors(descriptions) -> dict[str, tuple]:
    """{name: (shape, numpy dtype, bytes of the largest gear)}. ToolkitError for a type we do not feed."""
    found = {}
    for desc in descriptions:
        if int(desc.datatype) not in DTYPES:
            raise ToolkitError(
                f"{desc.name} of the .om has data type {desc.datatype}; float32, float16 and uint8 are "
                "understood: convert it with --output_type=FP16"
            )
        found[desc.name] = (tuple(desc.shape), DTYPES[int(desc.datatype)], desc.size)
    return found


def _last_run(session) -> float:
    """Milliseconds of the last run on the NPU, and forget it: 2023 lists numbers, later generations (start, end)."""
    summary = getattr(session, "summary", None) or session.sumary
    times = list(summary().exec_time_list)
    reset = getattr(session, "reset_summaryinfo", None) or session.reset_sumaryinfo
    reset()
    last = times[-1] if times else 0.0
    return last if isinstance(last, float) else last[1] - last[0]


def _release(thread: AclThread, session):
    """Unload in the thread that loaded. Without torch_npu the context goes too; with it the context may be torch_npu's
    own (2026 adopts it), so only the model is dropped, whose destructor unloads it and frees its memory."""

    def unload():
        free = getattr(session.session, "free_resource", None)
        if free and "torch_npu" not in sys.modules:
            free()
        session.session = None

    thread.call(unload)
    thread.stop()
