"""The `atc` command that compiles the exported graph to vision.om.

Takes what the user wants of the .om, returns a checked command line. atc leaves files in its
working directory, so it runs in a directory of its own inside the artifact directory, and every
path is `../name`.
"""

import json
import shlex
from dataclasses import dataclass, field

from models.config import PatchSpec
from models.family import Family
from runtime.engine.loading.memory import vision_parameters
from runtime.vision.artifact import ONNX

from .option_rules import MIXED, check_options, precision_option
from .patch_gears import default_gears, shape_options

NAME = "vision"  # of the .om
ATC_WORK = ".atc"
VARIANT = "vision_atc.onnx"
AIPP = "vision_aipp.cfg"
MIXLIST = "vision_mixlist.json"
SCRIPT = "atc.sh"
LADDER = ("fp16", "mixed_float16", "origin")  # faster to more precise
# Ascend operators that mixed precision leaves in fp32: fp16 overflows there first
KEEP_FP32 = ("LayerNorm", "SoftmaxV2")
OM_PART_BYTES = 4 << 30  # limit of one part of an .om: weights above it go beside it


@dataclass(frozen=True)
class OmRequest:
    """What to compile. `gears`: batch sizes (none: one image); `extra`: the user's own options;
    `patch_gears`: sizes of pictures of any size (none: chosen from the family's limits)."""

    soc_version: str
    precision_mode: str = "auto"
    aipp: bool = False
    gears: tuple[int, ...] = ()
    extra: dict = field(default_factory=dict)
    patch_gears: tuple[int, ...] = ()

    @property
    def modes(self) -> tuple[str, ...]:
        """Precision modes to try, in this order."""
        return LADDER if self.precision_mode == "auto" else (self.precision_mode,)

    def gears_for(self, family: Family) -> tuple[int, ...]:
        """Batch sizes, or patches of pictures of any size."""
        if isinstance(family.vision, PatchSpec):
            return self.patch_gears or default_gears(family)
        return self.gears

    @property
    def graph(self) -> str:
        """File name of the graph that atc reads."""
        return VARIANT if self.aipp or self.gears else ONNX


def check_modes(request: OmRequest, family: Family, cann: str | None):
    """ToolkitError for what atc of this CANN (None = any) would refuse, in any of the modes."""
    for mode in request.modes:
        check_options(atc_options(request, family, mode), cann)


def atc_command(request: OmRequest, family: Family, mode: str) -> list[str]:
    """["atc", "--name=value", ...], to be run in the directory `ATC_WORK` of the artifact."""
    options = atc_options(request, family, mode)
    return ["atc", *(f"--{name}={value}" for name, value in options.items())]


def atc_options(request: OmRequest, family: Family, mode: str) -> dict[str, str]:
    """atc's options in one precision mode; what the user gives replaces defaults of the same name.

    Input and output of the .om are fp16, as in existing blip2.om files (raw 0..255 values are exact
    in fp16); with AIPP the input is uint8.
    """
    name, value = precision_option(mode)
    options = {
        "model": f"../{request.graph}",
        "framework": "5",
        "output": NAME,
        "soc_version": request.soc_version,
        **input_options(request, family),
        "output_type": "FP16",
        name: value,
        "log": "error",
    }
    if mode.startswith(MIXED):
        options["modify_mixlist"] = f"../{MIXLIST}"
    if weight_bytes(family, mode) > OM_PART_BYTES:
        options["external_weight"] = "1"
    return {**options, **request.extra}


def input_options(request: OmRequest, family: Family) -> dict[str, str]:
    """Format, shape, gears and type of the inputs."""
    if isinstance(family.vision, PatchSpec):
        return shape_options(family.vision, request.gears_for(family))
    return {
        # with NHWC input only a label, and the one that existing OMs were built with
        "input_format": "NCHW",
        "input_shape": _input_shape(request, family),
        **_image_options(request, family),
    }


def _input_shape(request: OmRequest, family: Family) -> str:
    """Value of --input_shape, e.g. "input:1,224,224,3"; a batch of -1 stands for the gears."""
    batch, height, width, channels = family.vision.input_shape
    if request.gears:
        batch = -1
    image = (channels, height, width) if request.aipp else (height, width, channels)
    return f"{family.vision.input_name}:{_joined((batch, *image))}"


def _image_options(request: OmRequest, family: Family) -> dict[str, str]:
    options = {}
    if request.gears:
        options["dynamic_batch_size"] = _joined(request.gears)
    if request.aipp:
        options["insert_op_conf"] = f"../{AIPP}"
    else:
        options["input_fp16_nodes"] = family.vision.input_name
    return options


def _joined(numbers: tuple[int, ...]) -> str:
    return ",".join(map(str, numbers))


def weight_bytes(family: Family, mode: str) -> int:
    """Bytes of the weights in an .om, at most: fp16 halves them, all other modes may keep fp32."""
    element = 2 if mode in ("fp16", "force_fp16") else 4
    return vision_parameters(family) * element


def mixlist() -> str:
    """The file of --modify_mixlist: what mixed precision must not compute in fp16."""
    lists = {
        "black-list": {"to-remove": [], "to-add": KEEP_FP32},
        "white-list": {"to-remove": [], "to-add": []},
    }
    return json.dumps(lists, indent=2) + "\n"


def atc_script(arguments: list[str]) -> str:
    """atc.sh of the artifact directory."""
    lines = " \\\n    ".join(map(shlex.quote, arguments))
    return (
        "#!/bin/sh\n# Run where CANN is installed, after its set_env.sh; no NPU is needed. Writes vision.om here.\n"
        f'cd "$(dirname "$0")" && rm -rf {ATC_WORK} && mkdir {ATC_WORK} && cd {ATC_WORK} || exit 1\n'
        f"{lines} || exit 1\n"
        f"mv {NAME}*.om .. && if [ -d weight ]; then rm -rf ../weight && mv weight ..; fi\n"
    )
