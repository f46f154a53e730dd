"""Stand-in for the aclruntime extension module: its interface over ONNX Runtime on the CPU; an
".om" here is an ONNX file.

What tests rely on is as in the real one: the only check of an input is its byte size, messages go
to file descriptor 1, a failure is RuntimeError("[-1][ACL: general failure] "), a session belongs to
a context of a device, contexts belong to threads, destroying the object unloads the model. Gears
are in the ONNX metadata `dynamic_batch_size`.
"""

import ctypes
import os
import threading
import time
from types import SimpleNamespace

import numpy as np
import onnxruntime

DEVICES = 2
DTYPES = {
    "tensor(float)": (0, np.float32),
    "tensor(float16)": (1, np.float16),
    "tensor(uint8)": (4, np.uint8),
    "tensor(int64)": (9, np.int64),
}
current = threading.local()  # .context: the ACL context of this thread
LOADED = []  # paths of the models in "device memory"
OPENED = []  # device of every session ever opened
FREED = []  # contexts destroyed


class session_options:
    def __init__(self):
        self.loop = 1
        self.log_level = 2
        self.acl_json_path = ""


class BaseTensor:
    """Address and size of host memory, taken at their word."""

    def __init__(self, address, size):
        self.bytes = ctypes.string_at(address, size)


class Tensor:
    def __init__(self, array, device=-1):
        self.array = np.array(array, order="C")
        self.device = device

    bytes = property(lambda self: self.array.tobytes())
    shape = property(lambda self: list(self.array.shape))

    def to_device(self, device):
        self.device = device

    def to_host(self):
        self.device = -1

    def __array__(self, dtype=None, copy=None):
        if self.device >= 0:
            raise RuntimeError("tensor is in npu. can't convert to numpy array")
        return self.array


class Session:
    """InferenceSession. `pairs`: exec_time_list holds (start, end); `rebinds`: every call sets the
    session's context."""

    pairs = rebinds = True

    def __init__(self, path, device, options):
        self._path = None
        if not 0 <= device < DEVICES:
            fail(f"acl open device {device} failed")
        say("INFO", f"open device {device} success")
        self._context = current.context = object()
        self._options = options
        self._inputs = []
        self._times = []
        self._gear = None
        try:
            self._model = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception:
            fail(f"load model from file failed, model file is {path}")
        self._path = path
        LOADED.append(path)
        OPENED.append(device)
        say("INFO", f"load model {path} success")
        options = self._model.get_modelmeta().custom_metadata_map
        gears = options.get("dynamic_batch_size", "")
        self._gears = [int(gear) for gear in gears.split(",") if gear]
        dims = options.get("dynamic_dims", "")
        if dims:  # ours have the same number for every input
            self._gears = [int(gear.split(",")[0]) for gear in dims.split(";")]
        self._dims = bool(dims)
        self._inputs = [
            self._describe(item, max(self._gears, default=0)) for item in self._model.get_inputs()
        ]
        self._outputs = [
            self._describe(item, 0, f"node:{i}:")
            for i, item in enumerate(self._model.get_outputs())
        ]

    @staticmethod
    def _describe(item, largest, prefix=""):
        shape = [size if isinstance(size, int) else -1 for size in item.shape]
        number, dtype = DTYPES[item.type]
        size = (
            int(np.prod([largest if side < 0 else side for side in shape]))
            * np.dtype(dtype).itemsize
        )
        return SimpleNamespace(
            name=prefix + item.name,
            datatype=number,
            format=2,
            shape=shape,
            size=size,
            realsize=size,
        )

    def options(self):
        return self._options

    def get_inputs(self):
        return self._inputs

    def get_outputs(self):
        return self._outputs

    def set_staticbatch(self):
        self._gear = None
        return 0

    def set_dynamic_dims(self, text):
        """ "patches:256,1176;angles:256,64": all inputs in order, in one gear."""
        parts = [part.rpartition(":") for part in text.split(";")]
        sizes = {int(dims.split(",")[0]) for _, _, dims in parts}
        names = [name for name, _, _ in parts]
        known = self._dims and names == [desc.name for desc in self._inputs]
        if not known or len(sizes) != 1 or not sizes <= set(self._gears):
            fail("the dymDims parameter is not correct")
        return self._set_gear(sizes.pop())

    def set_dynamic_batchsize(self, batch):
        if self._dims or batch not in self._gears:
            fail("the dymBatch parameter is not correct")
        return self._set_gear(batch)

    def _set_gear(self, batch):
        self._gear = batch
        for desc in self._inputs:
            desc.realsize = desc.size * batch // max(self._gears)
        return 0

    def run(self, names, feeds):
        if self._path is None:
            fail("session is freed")
        if self.rebinds:
            current.context = self._context
        if getattr(current, "context", None) is not self._context:
            fail("the context of this thread is another one")
        if self._gears and self._gear is None:
            fail("dynamic model, but no gear is set")
        for i, (desc, feed) in enumerate(zip(self._inputs, feeds)):
            if len(feed.bytes) != desc.realsize:
                fail(
                    f"Check i:{i} name:{desc.name} in size:{len(feed.bytes)} needsize:{desc.realsize} not match"
                )
        return [Tensor(output, device=0) for output in self._execute(feeds)]

    def _execute(self, feeds):
        arrays = {
            item.name: np.frombuffer(feed.bytes, DTYPES[item.type][1]).reshape(
                [self._gear if side < 0 else side for side in desc.shape]
            )
            for item, desc, feed in zip(self._model.get_inputs(), self._inputs, feeds)
        }
        start = time.perf_counter() * 1000
        outputs = self._model.run(None, arrays)
        end = time.perf_counter() * 1000
        self._times.append((start, end) if self.pairs else end - start)
        return outputs

    def sumary(self):
        return SimpleNamespace(exec_time_list=list(self._times))

    def reset_sumaryinfo(self):
        self._times.clear()

    def _free_resource(self):
        self._destroy()
        FREED.append(self._context)
        current.context = None

    def _destroy(self):
        if self._path is not None:
            LOADED.remove(self._path)
            self._path = None

    __del__ = _destroy


def say(level, text):
    os.write(1, f"[{level}] {text}\n".encode())


def fail(text):
    say("ERROR", text)
    raise RuntimeError("[-1][ACL: general failure] ")
