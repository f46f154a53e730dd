"""The `atc` command that turns the exported graph into vision.om: what the user wants in, a checked command line out.

atc runs in a work folder inside the artifact folder, because it leaves files in its working folder; so every path is
`../name`.
"""

import json
import shlex
from dataclasses import dataclass, field

from models.family import Family
from runtime.engine.loading.memory import vision_parameters
from runtime.vision.artifact import ONNX

from . import option_rules as atc_options

NAME = "vision"  # of the .om
WORK = ".atc"
VARIANT = "vision_atc.onnx"
AIPP = "vision_aipp.cfg"
MIXLIST = "vision_mixlist.json"
LADDER = ("fp16", "mixed_float16", "origin")  # faster to more precise
KEEP = (
    "LayerNorm",
    "SoftmaxV2",
)  # Ascend operators that mixed precision leaves in fp32: fp16 overflows there first
OM_PART_BYTES = 4 << 30  # limit of one part of an .om: weights above it go beside it


@dataclass(frozen=True)
class Request:
    """What to compile: `gears` = batch sizes (none: one picture), `extra` = further atc options of the user."""

    soc_version: str
    precision_mode: str = "auto"
    aipp: bool = False
    gears: tuple[int, ...] = ()
    extra: dict = field(default_factory=dict)

    @property
    def modes(self) -> tuple[str, ...]:
        """Precision modes to try, in this order."""
        return LADDER if self.precision_mode == "auto" else (self.precision_mode,)

    @property
    def graph(self) -> str:
        return VARIANT if self.aipp or self.gears else ONNX


def check(request: Request, family: Family, cann: str | None):
    """ToolkitError for what atc of this CANN version (None = any) would refuse, in any of the modes."""
    for mode in request.modes:
        atc_options.check(options(request, family, mode), cann)


def command(request: Request, family: Family, mode: str) -> list[str]:
    """Arguments of `atc`, to be run in the folder `WORK` of the artifact."""
    return ["atc", *(f"--{name}={value}" for name, value in options(request, family, mode).items())]


def options(request: Request, family: Family, mode: str) -> dict[str, str]:
    """atc's options in one precision mode; what the user gives replaces defaults of the same name.

    Input and output of the .om are fp16, as in existing blip2.om files (raw 0..255 values are exact in fp16); with AIPP
    the input is uint8.
    """
    name, value = atc_options.precision_option(mode)
    result = {
        "model": f"../{request.graph}",
        "framework": "5",
        "output": NAME,
        "soc_version": request.soc_version,
        "input_format": "NCHW",  # with NHWC input only a label, and the one existing OMs were built with
        "input_shape": input_shape(request, family),
        **_input(request, family),
        "output_type": "FP16",
        name: value,
        "log": "error",
    }
    if mode.startswith(atc_options.MIXED):
        result["modify_mixlist"] = f"../{MIXLIST}"
    if weight_bytes(family, mode) > OM_PART_BYTES:
        result["external_weight"] = "1"
    return {**result, **request.extra}


def input_shape(request: Request, family: Family) -> str:
    batch, height, width, channels = family.vision.input_shape
    shape = (channels, height, width) if request.aipp else (height, width, channels)
    return f"{family.vision.input_name}:" + ",".join(
        map(str, (-1 if request.gears else batch, *shape))
    )


def _input(request, family) -> dict[str, str]:
    gears = {"dynamic_batch_size": ",".join(map(str, request.gears))} if request.gears else {}
    kind = (
        {"insert_op_conf": f"../{AIPP}"}
        if request.aipp
        else {"input_fp16_nodes": family.vision.input_name}
    )
    return gears | kind


def weight_bytes(family: Family, mode: str) -> int:
    """Weights in an .om, at most: fp16 halves them, all other modes may keep fp32."""
    return vision_parameters(family) * (2 if mode in ("fp16", "force_fp16") else 4)


def mixlist() -> str:
    """The file of --modify_mixlist: what mixed precision must not compute in fp16."""
    return (
        json.dumps(
            {
                "black-list": {"to-remove": [], "to-add": KEEP},
                "white-list": {"to-remove": [], "to-add": []},
            },
            indent=2,
        )
        + "\n"
    )


def script(arguments: list[str]) -> str:
    """atc.sh of the artifact folder."""
    lines = " \\\n    ".join(map(shlex.quote, arguments))
    return (
        "#!/bin/sh\n# Run where CANN is installed, after its set_env.sh; no NPU is needed. Writes vision.om here.\n"
        f'cd "$(dirname "$0")" && rm -rf {WORK} && mkdir {WORK} && cd {WORK} || exit 1\n'
        f"{lines} || exit 1\n"
        f"mv {NAME}*.om .. && if [ -d weight ]; then rm -rf ../weight && mv weight ..; fi\n"
    )
