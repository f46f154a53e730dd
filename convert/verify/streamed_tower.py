"""The torch side of the verification, with a part of the weights in memory at a time.

Takes a family and its checkpoint, returns the features that the family's own module computes in
fp32.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from models.checkpoint import Checkpoint
from models.checkpoint.table import Weight
from models.family import Family
from models.network.vision_blocks import Attention, Dense, repeated_lists

from .pieces import FLOAT_BYTES, SCORE_BYTES


class StreamedTower:
    """The family's own tower on the CPU; `steps` parts of it get their weights from the checkpoint
    for the moment they run, and large attentions look at some of their queries at a time.

    `advance()` is called after each part.
    """

    def __init__(self, family: Family, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.weights = list(family.weights())
        self.advance = lambda: None
        with torch.device("meta"):
            self.tower = family.vision_encoder().eval().requires_grad_(False)
        parts = _parts(self.tower)
        self.steps = len(parts)
        prefixes = tuple(f"vision.{path}." for path in parts)
        self._load(self.tower, "vision.", _outside(self.weights, prefixes))
        for path, part in parts.items():
            self._stream(part, f"vision.{path}.")
        for module in self.tower.modules():
            if isinstance(module, Attention):
                module.mix = _in_slices(module.mix)

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The encoder's inputs, float32 as the family's VisionSpec or PatchSpec says -> features."""
        with torch.inference_mode():
            return self.tower(*map(torch.from_numpy, inputs.values())).numpy()

    def _stream(self, part: nn.Module, prefix: str):
        def unload(*_):
            part.to("meta")
            self.advance()

        part.register_forward_pre_hook(lambda *_: self._load(part, prefix, self.weights))
        part.register_forward_hook(unload)

    def _load(self, module: nn.Module, prefix: str, weights: list[Weight]):
        values = {}
        for target, tensor in self.checkpoint.assemble(weights, prefix, torch.float32):
            values[target.removeprefix(prefix)] = tensor
        module.load_state_dict(values, strict=False, assign=True)


def _parts(tower: nn.Module) -> dict[str, nn.Module]:
    """{path: module} of the repeated blocks and of the large layers outside them."""
    lists = tuple(f"{path}." for path in repeated_lists(tower))
    parts = {}
    for path, module in tower.named_modules():
        is_block = f"{path.rpartition('.')[0]}." in lists
        if is_block or (isinstance(module, Dense | nn.Conv2d) and not path.startswith(lists)):
            parts[path] = module
    return parts


def _in_slices(mix: Callable) -> Callable:
    """Attention.mix with at most SCORE_BYTES of scores at a time."""

    def sliced(q, k, v):
        row_bytes = FLOAT_BYTES * q.shape[0] * q.shape[1] * k.shape[2]
        parts = q.split(max(1, SCORE_BYTES // row_bytes), dim=2)
        return torch.cat([mix(part, k, v) for part in parts], dim=2)

    return sliced


def _outside(weights: list[Weight], prefixes: tuple[str, ...]) -> list[Weight]:
    """Weights with a part whose target starts with none of `prefixes`."""
    outside = []
    for weight in weights:
        if not all(str(part.target).startswith(prefixes) for part in weight.parts):
            outside.append(weight)
    return outside
