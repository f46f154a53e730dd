"""The vision encoder as an .om on the NPU, and which .om that is.

Pictures flow in as raw float32 NHWC, features flow out as float32; the file itself may take float32, float16 or uint8
(raw 0..255 is exact in all three) and give float32 or float16, one picture at a time or in batch gears.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.config import VisionSpec
from runtime.ascend.aclruntime import OmModel
from runtime.ascend.host import Host, parse_npu_smi
from runtime.common.errors import ToolkitError

from . import artifact
from .session import VisionSession
from .source import Source

LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class OmFile:
    """An .om; whether a manifest of this very checkpoint says that it was verified, and the chip it was built for."""

    path: Path
    verified: bool = False
    soc: str | None = None

    @property
    def note(self) -> str:
        return (
            ""
            if self.verified
            else (
                f"note: {self.path} is not verified against this checkpoint; only its shapes are "
                "checked. `python -m runtime.compare` measures it"
            )
        )


class OmVision(VisionSession):
    """An .om on npu:`device_id`. `npu_seconds`: time of the last call on the NPU without copies."""

    stage = "OM vision encoder"

    def __init__(
        self, path: str | Path, spec: VisionSpec, device_id: int = 0, verified: bool = False
    ):
        super().__init__(spec)
        self.model = OmModel(path, device_id, spec.output_name)
        self.verified = verified
        try:
            _check_interface(self.model, spec)
        except ToolkitError:
            self.close()
            raise
        self.batch = self.model.gears[-1]

    @property
    def npu_seconds(self) -> float:
        return self.model.npu_seconds

    def close(self):
        self.model.close()

    def _encode(self, pixels):
        gear = next(gear for gear in self.model.gears if gear >= len(pixels))
        filled = np.zeros((gear, *pixels.shape[1:]), self.model.input_dtype)
        filled[: len(pixels)] = pixels
        if not np.array_equal(filled[: len(pixels)], pixels):
            raise ToolkitError(
                f"{self.model.path} takes {filled.dtype}, which cannot hold these pixels; prepare pictures "
                "with the family's `pixels`"
            )
        features = self.model.run(filled)[: len(pixels)].astype(np.float32)
        if (
            self.model.output_dtype == np.float16
        ):  # aclruntime lets the NPU saturate: an overflow looks finite
            features[np.abs(features) >= LARGEST_HALF] = np.inf
        return features

    def describe(self):
        model = self.model
        gears = f", gears {', '.join(map(str, model.gears))}" if len(model.gears) > 1 else ""
        return (
            f"vision: om {model.path} on npu:{model.device_id}, {model.input_dtype} in, {model.output_dtype} out{gears}"
            + ("" if self.verified else ", not verified against this checkpoint")
        )


def open_om(path: str | Path, spec: VisionSpec, device_id: int = 0) -> OmVision:
    """Session of the .om at `path` if its interface is `spec`'s; `encode`, `npu_seconds`, `close`. ToolkitError if not."""
    return OmVision(path, spec, device_id)


def find_om(source: Source, given: str | Path | None = None) -> OmFile | None:
    """The .om to use: `given` or the one in that directory, else the cached artifact's, else the one beside the
    checkpoint, where the blip2.om of older guides lies. ToolkitError when `given` does not fit or there are several.
    """
    if given is not None:
        return _om_of(Path(given), source)
    cached = _om_of(artifact.cache_directory(source), source)
    return cached or _om_of(source.checkpoint.directory, source)


def _om_of(path: Path, source: Source) -> OmFile | None:
    """`path` itself if it is an .om, else the one of the artifact there, else the only one in that directory."""
    if path.suffix == ".om":
        return OmFile(path)
    if (path / artifact.MANIFEST).is_file():
        manifest = artifact.load(path)
        artifact.check_fits(manifest, source, path)
        om = artifact.om_file(manifest, path)
        if om is not None:
            return OmFile(om, manifest.status == artifact.OM_VERIFIED, manifest.soc_version)
    files = sorted(path.glob("*.om"))
    if len(files) > 1:
        raise ToolkitError(
            f"{path} holds {len(files)} .om files ({', '.join(file.name for file in files)}); name one with "
            "--artifact"
        )
    return OmFile(files[0]) if files else None


def check_chip(om: OmFile):
    """ToolkitError when the manifest says another chip than all that `npu-smi` lists; what it does not list is not known."""
    if om.soc is None:
        return
    here = {
        device.soc for device in parse_npu_smi(Host().run("npu-smi", "info", timeout=10)[1])
    } - {"Ascend910"}
    if here and om.soc not in here:
        raise ToolkitError(
            f"{om.path} was built for {om.soc}, this machine has {', '.join(sorted(here))}; run `python -m "
            f"convert` again with --soc-version {min(here)}"
        )


def _check_interface(model: OmModel, spec: VisionSpec):
    for what, shape, wanted in (
        ("input", model.input_shape, spec.input_shape),
        ("output", model.output_shape, spec.output_shape),
    ):
        if shape[1:] != wanted[1:]:
            raise ToolkitError(
                f"{model.path} has {what} shape {list(shape)}, this model needs [batch, "
                f"{', '.join(map(str, wanted[1:]))}]; convert it with `python -m convert`"
            )
