"""The external data file of an ONNX model. Takes tensor after tensor, returns each one's place.

Hashing and writing run in threads, one tensor behind, so that they overlap with reading the next
tensor. Written data does not pass through the page cache where the file system can do without it:
gigabytes of fresh cache pages cost more than the disk does, above all in virtual machines, and
would push out what other programs have cached.
"""

import errno
import hashlib
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnx_ir as ir
import torch

ALIGNMENT = 4096  # of every tensor: a page, so that the file can be mapped
STAGE_BYTES = 8 << 20
OVERLAP_BYTES = 64 << 20  # larger tensors are alone in memory


class DataFile:
    """Context manager; after it the file is on the disk, `size` and `sha256` describe it."""

    def __init__(self, path: Path):
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def __enter__(self):
        self._file = _open(self.path)
        self._stage = mmap.mmap(-1, STAGE_BYTES)
        self._filled = 0  # page-aligned, as direct writes must be
        self._pool = ThreadPoolExecutor(2)
        self._pending = []
        return self

    def __exit__(self, kind, *rest):
        try:
            self._wait()
            if kind is None:
                self._flush()
                os.ftruncate(self._file, self.size)
                os.fsync(self._file)
        finally:
            self._pool.shutdown()
            os.close(self._file)

    def write(self, name: str, tensor: torch.Tensor) -> ir.ExternalTensor:
        """Append a float32 tensor and return the reference by which the model finds it.

        OSError as soon as the disk is full, at the latest with the next tensor.
        """
        array = tensor.contiguous().numpy()
        padding = bytes(-self.size % ALIGNMENT)
        content = memoryview(array).cast("B")
        offset = self.size + len(padding)
        self.size = offset + array.nbytes
        self._wait()
        self._pending = [
            self._pool.submit(self._digest, padding, content),
            self._pool.submit(self._append, padding, content),
        ]
        if array.nbytes > OVERLAP_BYTES:
            self._wait()
        return ir.ExternalTensor(
            self.path.name,
            offset,
            array.nbytes,
            ir.DataType.FLOAT,
            name=name,
            shape=ir.Shape(array.shape),
            base_dir=self.path.parent,
        )

    def _wait(self):
        for job in self._pending:
            job.result()
        self._pending = []

    def _digest(self, padding: bytes, content: memoryview):
        self._hash.update(padding)
        self._hash.update(content)

    def _append(self, padding: bytes, content: memoryview):
        for data in (padding, content):
            while len(data):
                count = min(len(data), STAGE_BYTES - self._filled)
                self._stage[self._filled : self._filled + count] = data[:count]
                self._filled += count
                data = data[count:]
                if self._filled == STAGE_BYTES:
                    self._flush()

    def _flush(self):
        """Write whole pages only; `__exit__` cuts off what the last one adds beyond the end."""
        pages = -(-self._filled // ALIGNMENT)
        data = memoryview(self._stage)[: pages * ALIGNMENT]
        while len(data):
            data = data[os.write(self._file, data) :]
        self._filled = 0


def _open(path: Path) -> int:
    """Descriptor of a new file; what had its name before is gone, and no link is followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    path.unlink(missing_ok=True)
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    path.unlink(missing_ok=True)  # made, although it cannot be written so
    return os.open(path, flags, 0o644)
