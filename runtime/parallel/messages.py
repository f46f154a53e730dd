"""Messages between the processes of a split model: takes plain values and tensors, returns bytes,
and the other way round.

A message is JSON, with the raw bytes of its tensors behind it, under a tag (HMAC-SHA256) that only
who holds the key can make. Nothing that a message says is ever run.
"""

import hashlib
import hmac
import json
import math
import os

import torch

from runtime.common.errors import CHECK_FAILED, ToolkitError

TAG_BYTES = 32  # of SHA-256
NUMBER_BYTES = 8  # of a length or a count
DTYPES = {
    "bool": torch.bool,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PLAIN = (type(None), bool, int, float, str)


class Sealer:
    """Seals messages, or opens them in the same order: each tag also counts the messages before, so
    that none can be left out, repeated or moved. key: bytes that both sides know."""

    def __init__(self, key: bytes):
        self._key = key
        self._count = 0

    def seal(self, content: dict) -> bytes:
        """A dict of plain values, lists, dicts and tensors -> bytes."""
        body = encode(content)
        return self._tag(body) + body

    def open(self, sealed: bytes) -> dict:
        """What `seal` was given. ToolkitError for bytes that the key's holder did not seal."""
        tag, body = sealed[:TAG_BYTES], sealed[TAG_BYTES:]
        if not hmac.compare_digest(tag, self._tag(body)):
            raise ToolkitError(
                "a message between the processes of this model was not sent by its process 0; all were "
                "ended, run the same command again",
                CHECK_FAILED,
            )
        return decode(body)

    def _tag(self, body: bytes) -> bytes:
        count = self._count.to_bytes(NUMBER_BYTES, "little")
        self._count += 1
        return hmac.digest(self._key, count + body, hashlib.sha256)


def encode(content: dict) -> bytes:
    """A dict of plain values, lists, dicts and tensors -> bytes. TypeError for anything else."""
    tensors = []
    tree = _tree(content, tensors)
    described = [[NAMES[tensor.dtype], list(tensor.shape)] for tensor in tensors]
    header = json.dumps({"content": tree, "tensors": described}).encode()
    parts = [len(header).to_bytes(NUMBER_BYTES, "little"), header]
    parts += [_bytes(tensor) for tensor in tensors]
    return b"".join(parts)


def _tree(value, tensors: list[torch.Tensor]):
    """The value as JSON has it; its tensors are appended to `tensors`, their places say which."""
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_tree(each, tensors) for each in value]
    if isinstance(value, dict):
        return {"fields": {name: _tree(each, tensors) for name, each in value.items()}}
    if isinstance(value, torch.Tensor) and value.dtype in NAMES:
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    raise TypeError(f"a message cannot hold {type(value).__name__}")


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def decode(body: bytes) -> dict:
    """What `encode` was given; tuples come back as lists, paths as strings. ValueError for other bytes."""
    end = NUMBER_BYTES + int.from_bytes(body[:NUMBER_BYTES], "little")
    header = json.loads(body[NUMBER_BYTES:end])
    tensors = []
    for name, shape in header["tensors"]:
        size = math.prod(shape) * DTYPES[name].itemsize
        if size > len(body) - end:
            raise ValueError(f"a message of {len(body)} bytes names a tensor of {size} more")
        tensors.append(_tensor(body[end : end + size], DTYPES[name], shape))
        end += size
    return _value(header["content"], tensors)


def _tensor(raw: bytes, dtype: torch.dtype, shape: list[int]) -> torch.Tensor:
    if not raw:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


def _value(tree, tensors: list[torch.Tensor]):
    if isinstance(tree, list):
        return [_value(each, tensors) for each in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    return {name: _value(each, tensors) for name, each in tree["fields"].items()}
