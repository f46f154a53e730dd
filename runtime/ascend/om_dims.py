"""An .om of several inputs whose first dimension is one of a few sizes (atc's --dynamic_dims): takes
arrays by name, returns arrays."""

import numpy as np

from runtime.common.errors import ToolkitError

from .aclruntime import OmModel


class DimsModel(OmModel):
    """An .om whose inputs are all [n, width], n one of `gears`.

    inputs: {name: (shape with -1 in front, numpy dtype)}, in the file's order.
    """

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """{name: [n, width]}, in the file's own dtypes, -> the output. ToolkitError for anything
        else."""
        feeds = []
        for name, (shape, dtype) in self.inputs.items():
            array = inputs[name]
            if array.dtype != dtype or array.shape[1:] != shape[1:]:
                raise ToolkitError(
                    f"{self.path} takes {name} as {dtype} {list(shape)}, got {array.dtype} "
                    f"{list(array.shape)}"
                )
            feeds.append(np.ascontiguousarray(array))
        size = len(feeds[0])
        if size not in self.gears or any(len(feed) != size for feed in feeds):
            raise ToolkitError(
                f"{self.path} has no gear of {size} rows; it has {', '.join(map(str, self.gears))}"
            )
        return self._call("run", self._infer, feeds)

    def _describe(self, output_name):
        inputs, outputs = self._call("be read", self._tensors)
        self.inputs = {name: (shape, dtype) for name, (shape, dtype, _) in inputs.items()}
        for name, (shape, _) in self.inputs.items():
            if len(shape) != 2 or shape[0] != -1 or shape[1] < 1:
                raise ToolkitError(
                    f"{self.path} has input {name} of shape {list(shape)}, not [-1, width]; convert it "
                    "with `python -m convert`"
                )
        names = list(outputs)
        self._output = self._choose(names, output_name)
        self.output_shape, self.output_dtype, _ = outputs[names[self._output]]
        shape, dtype, largest = next(iter(inputs.values()))
        self.gears = self._find_gears(largest // (shape[1] * dtype.itemsize))

    def _find_gears(self, most: int) -> tuple[int, ...]:
        """Sizes up to `most` that it can run, ascending; aclruntime does not list them, but rejects
        others."""
        gears = []
        for size in range(4, most + 1, 4):
            if self._call("be asked for its gears", self._accepts, size):
                gears.append(size)
        if not gears:
            raise ToolkitError(
                f"{self.path} accepts no size of its inputs; convert it with `python -m convert`"
            )
        return tuple(gears)

    def _accepts(self, size) -> bool:
        try:
            return not self._session.set_dynamic_dims(self._sizes(size))
        except RuntimeError:
            return False

    def _infer(self, feeds) -> np.ndarray:
        session = self._session
        session.set_dynamic_dims(self._sizes(len(feeds[0])))  # 2023's infer does not do it
        for desc, feed in zip(session.get_inputs(), feeds):
            if feed.nbytes != desc.realsize:
                raise RuntimeError(
                    f"{desc.name} wants {desc.realsize:,} bytes, not {feed.nbytes:,}"
                )
        output = session.infer(feeds, mode="dymdims")[self._output]
        self._note_time(session)
        return output

    def _sizes(self, size: int) -> str:
        """aclruntime's spelling: "patches:256,1176;angles:256,64"."""
        parts = [f"{name}:{size},{shape[1]}" for name, (shape, _) in self.inputs.items()]
        return ";".join(parts)
