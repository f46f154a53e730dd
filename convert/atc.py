"""The `atc` command that turns vision.onnx into vision.om, as text: for the machine where CANN is installed."""
import re
import shlex

from models.base import VisionSpec
from runtime.artifact import ONNX
from runtime.errors import ToolkitError

SOC = re.compile(r"Ascend\d\w*(-\d)?")


def check_soc(name: str):
    """ToolkitError unless `name` can be a --soc_version; Ascend910B without a digit is older than 910B1 to 910B4."""
    if not SOC.fullmatch(name):
        raise ToolkitError(f"--soc-version is {name!r}: give `Ascend` and the chip name of `npu-smi info`, "
                           "e.g. Ascend910B3 or Ascend310P3")
    if name == "Ascend910B":
        raise ToolkitError("--soc-version Ascend910B is the first 910, not an Atlas A2; "
                           "give the full name of `npu-smi info`, e.g. Ascend910B3")


def command(spec: VisionSpec, soc_version: str) -> list[str]:
    """Arguments of `atc`, to be run inside the artifact directory: vision.onnx.data is looked up beside vision.onnx.

    Input and output of the .om are fp16, as in existing blip2.om files; raw 0..255 values are exact in fp16.
    """
    shape = ",".join(map(str, spec.input_shape))
    return ["atc", f"--model={ONNX}", "--framework=5", "--output=vision", f"--soc_version={soc_version}",
            "--input_format=NCHW",      # only a label for an ONNX input, and the one existing NHWC OMs were built with
            f"--input_shape={spec.input_name}:{shape}", f"--input_fp16_nodes={spec.input_name}", "--output_type=FP16",
            "--precision_mode_v2=fp16", "--log=error"]


def script(spec: VisionSpec, soc_version: str) -> str:
    """atc.sh of the artifact directory."""
    return ("#!/bin/sh\n# Run where CANN is installed, after its set_env.sh; no NPU is needed. Writes vision.om here.\n"
            'cd "$(dirname "$0")" || exit 1\n' + _lines(command(spec, soc_version)) + "\n")


def _lines(arguments: list[str]) -> str:
    return " \\\n    ".join(map(shlex.quote, arguments))
