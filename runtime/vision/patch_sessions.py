"""Vision sessions of pictures of any size: one interface over torch, ONNX Runtime and an .om.

Takes Patches, returns their feature rows. Pictures that are encoded together stand one behind the
other; none attends to another.
"""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from models.checkpoint import Checkpoint
from models.config import BLOCK_PATCHES, PATCH
from models.family import Family
from models.prompt.patches import Patches
from runtime.ascend.om_dims import DimsModel
from runtime.common.errors import ToolkitError
from runtime.common.machine import available_memory, gib

from .om_session import with_overflow
from .onnx_session import OnnxGraph
from .packed_tower import waves_and_noise
from .session import VisionSession, check_finite, check_shape
from .torch_session import load_packed, torch_line

FILLER = {"segments": -1.0}  # a picture of its own; zero in all other inputs
SCORE_BYTES = 1 << 30  # of one layer's attention scores: what is encoded together stays below
SCORE_COPIES = 3  # that ONNX Runtime holds at a time: products, their sum with the mask, softmax
TEST_SIZE = (112, 168)  # height and width of the picture on which bf16 and int8 are checked


class PatchSession(VisionSession):
    """What every session does around `_encode`: group the pictures, and check their features.

    most_patches: that are encoded in one call, if one picture alone does not have more.
    """

    def __init__(self, family: Family, most_patches: int):
        self.family = family
        self.spec = family.vision
        self.most_patches = most_patches

    def encode_all(self, pictures: list[Patches]):
        features = []
        for group in grouped(pictures, self.most_patches):
            rows = self._encode(self.family.encoder_inputs(group))
            counts = [picture.num_tokens for picture in group]
            check_shape(rows, (sum(counts), self.spec.hidden), self.stage)
            check_finite(rows, self.stage)
            features += np.split(rows, np.cumsum(counts)[:-1])
        return features

    def _encode(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """{name: float32 [N, width]} -> float32 [N / 4, hidden]"""
        raise NotImplementedError


class TorchPatches(PatchSession):
    """The family's own module on the CPU, packed; attention never holds a score for every pair of
    patches."""

    stage = "torch vision encoder"

    def __init__(self, family: Family, checkpoint: Checkpoint, precision: str = "fp32"):
        """ToolkitError when bf16 or int8 changes the features too much."""
        super().__init__(family, most_together(family))
        self.precision = precision
        self.source = checkpoint.directory
        self.tower = load_packed(family, checkpoint, precision, self._test_inputs)

    def _test_inputs(self):
        pixels = waves_and_noise((1, *TEST_SIZE, 3))[0]
        picture = self.family.pixels(Image.fromarray(pixels.astype(np.uint8)))
        return [torch.from_numpy(x) for x in self.family.encoder_inputs([picture]).values()]

    def _encode(self, inputs):
        with torch.inference_mode():
            return self.tower(*map(torch.from_numpy, inputs.values())).float().numpy()

    def describe(self):
        return torch_line(self.precision, self.source)


class OnnxPatches(PatchSession):
    """The exported graph in ONNX Runtime on the CPU, in fp32.

    large: opens the session of a picture whose scores would take more than SCORE_BYTES; None: it is
    encoded here, if the memory suffices.
    """

    stage = "ONNX vision encoder"

    def __init__(
        self, directory, family: Family, threads: int | None = None, verified=True, large=None
    ):
        super().__init__(family, most_together(family))
        self.graph = OnnxGraph(directory, self.spec.output_name, threads, verified)
        self.unverified = self.graph.unverified
        self._open_large = large
        self._large = None

    def _encode(self, inputs):
        patches = len(inputs["patches"])
        if patches > self.most_patches and self._open_large:
            self._large = self._large or self._open_large()
            return self._large._encode(inputs)
        self._check_memory(patches)
        return self.graph.run(inputs)

    def _check_memory(self, patches: int):
        needed = SCORE_COPIES * 4 * self.family.tower.heads * patches**2
        available = available_memory()
        if needed > available:
            raise ToolkitError(
                f"a picture of {patches:,} patches needs {gib(needed)} GiB for its attention in ONNX "
                f"Runtime, {gib(available)} are free; use --vision torch, or a smaller picture"
            )

    def describe(self):
        return self.graph.describe()


class OmPatches(PatchSession):
    """An .om on npu:`device_id`, in gears of patches; the rest of a gear is filled with patches that
    no picture attends to."""

    stage = "OM vision encoder"

    def __init__(self, path, family: Family, device_id: int = 0, verified: bool = False):
        """ToolkitError when the file cannot be loaded or its inputs are not this model's."""
        self.model = DimsModel(path, device_id, family.vision.output_name)
        super().__init__(family, self.model.gears[-1])
        self.verified = verified
        try:
            self._check_interface()
        except ToolkitError:
            self.close()
            raise

    @property
    def unverified(self) -> Path | None:
        return None if self.verified else self.model.path

    @property
    def npu_seconds(self) -> float:
        return self.model.npu_seconds

    def close(self):
        self.model.close()

    def _check_interface(self):
        widths = {name: shape[1] for name, (shape, _) in self.model.inputs.items()}
        if widths != self.spec.widths or self.model.output_shape[1:] != (self.spec.hidden,):
            raise ToolkitError(
                f"{self.model.path} takes {widths} and gives rows of {list(self.model.output_shape[1:])}, "
                f"this model needs {self.spec.widths} and {self.spec.hidden}; convert it with "
                "`python -m convert`"
            )

    def _encode(self, inputs):
        patches = len(inputs["patches"])
        gear = self._gear_of(patches)
        filled = {}
        for name, (_, dtype) in self.model.inputs.items():
            rest = np.full(
                (gear - patches, inputs[name].shape[1]), FILLER.get(name, 0.0), np.float32
            )
            filled[name] = np.concatenate((inputs[name], rest)).astype(dtype)
        return with_overflow(self.model.run(filled)[: patches // BLOCK_PATCHES])

    def _gear_of(self, patches: int) -> int:
        for gear in self.model.gears:
            if gear >= patches:
                return gear
        raise ToolkitError(
            f"a picture of {patches:,} patches does not fit {self.model.path}, whose largest gear is "
            f"{self.model.gears[-1]:,}; give one of at most {self.model.gears[-1] * PATCH**2:,} pixels, or "
            f"convert again with --gears up to {patches}"
        )

    def describe(self):
        gears = ", ".join(map(str, self.model.gears))
        text = f"vision: om {self.model.path} on npu:{self.model.device_id}, gears {gears}"
        return text if self.verified else text + ", not verified against this checkpoint"


def most_together(family: Family) -> int:
    """Patches of pictures that are encoded in one call."""
    return int((SCORE_BYTES / (4 * family.tower.heads)) ** 0.5)


def grouped(pictures: list[Patches], most: int) -> list[list[Patches]]:
    """The pictures in order, as many together as have at most `most` patches, at least one."""
    groups = []
    held = 0
    for picture in pictures:
        count = len(picture.rows)
        if not groups or held + count > most:
            groups.append([])
            held = 0
        groups[-1].append(picture)
        held += count
    return groups
