"""The torch side of the verification, with the weights of one block in memory at a time.

Takes a family and its checkpoint, returns the features that the family's own module computes in
fp32.
"""

import numpy as np
import torch
from torch import nn

from models.checkpoint import Checkpoint
from models.checkpoint.table import Weight
from models.family import Family
from models.network.vision_blocks import repeated_lists


class StreamedTower:
    """The family's own tower on the CPU; `steps` blocks get their weights from the checkpoint for
    the moment they run.

    `advance()` is called after each block.
    """

    def __init__(self, family: Family, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.weights = list(family.weights())
        self.advance = lambda: None
        with torch.device("meta"):
            self.tower = family.vision_encoder().eval().requires_grad_(False)
        blocks = _blocks(self.tower)
        self.steps = len(blocks)
        prefixes = tuple(f"vision.{path}." for path in blocks)
        self._load(self.tower, "vision.", _outside(self.weights, prefixes))
        for path, block in blocks.items():
            self._stream(block, f"vision.{path}.")

    def run(self, pixels: np.ndarray) -> np.ndarray:
        """float32 [1, ...] as the family's VisionSpec says -> float32 [1, rows, hidden]."""
        with torch.inference_mode():
            return self.tower(torch.from_numpy(pixels)).numpy()

    def _stream(self, block: nn.Module, prefix: str):
        def unload(*_):
            block.to("meta")
            self.advance()

        block.register_forward_pre_hook(lambda *_: self._load(block, prefix, self.weights))
        block.register_forward_hook(unload)

    def _load(self, module: nn.Module, prefix: str, weights: list[Weight]):
        values = {}
        for target, tensor in self.checkpoint.assemble(weights, prefix, torch.float32):
            values[target.removeprefix(prefix)] = tensor
        module.load_state_dict(values, strict=False, assign=True)


def _blocks(tower: nn.Module) -> dict[str, nn.Module]:
    """{path: block} of the blocks that make up nearly all of the tower."""
    blocks = {}
    for path in repeated_lists(tower):
        for index, block in enumerate(tower.get_submodule(path)):
            blocks[f"{path}.{index}"] = block
    return blocks


def _outside(weights: list[Weight], prefixes: tuple[str, ...]) -> list[Weight]:
    """Weights with a part whose target starts with none of `prefixes`."""
    outside = []
    for weight in weights:
        if not all(str(part.target).startswith(prefixes) for part in weight.parts):
            outside.append(weight)
    return outside
