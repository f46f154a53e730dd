"""`python -m quant`: quantises a checkpoint.

Takes a float checkpoint, writes a quantised one that MindIE and vllm-ascend load.

Stages: measure, quantise layer by layer with msmodelslim, judge, publish. A killed run resumes
after its last finished layer; nothing that looks finished is written unless the quality gate holds.
`python -m quant validate DIR` checks a folder, `python -m quant compress` makes W8A8SC of W8A8S.
"""

import sys

from runtime.common.errors import ToolkitError, run_command
from runtime.common.flags import Parser

from .options import (
    CalibrationOptions,
    CompressOptions,
    GateOptions,
    QuantOptions,
    RecipeOptions,
    translated,
)


def main(argv: list[str]) -> int:
    if argv[:1] == ["validate"]:
        return validate(argv[1:])
    if argv[:1] == ["compress"]:
        return compress(argv[1:])
    return quantise(argv)


def quantise(argv: list[str]) -> int:
    options = Parser(
        "python -m quant",
        "--model DIR --out DIR [options] | validate DIR | compress --model DIR --out DIR | "
        "-src DIR -dst DIR | SRC W8A8S_DST CALIB TP DEVICE DEVICES",
        "Quantises the language model of a checkpoint with msmodelslim, layer by layer, proves it against the "
        "float model and writes what MindIE and vllm-ascend load. `validate DIR` checks such a folder instead; "
        "`compress` makes W8A8SC of W8A8S, for the 310P. The last two forms are those of MindIE's guide for "
        "GLM-4-9B; the six words mean --scheme w8a8s --dtype float16 and name the compress command to run next.",
        {
            "quantisation": QuantOptions,
            "calibration": CalibrationOptions,
            "recipe": RecipeOptions,
            "quality gate": GateOptions,
        },
    ).parse(translated(argv))
    from . import pipeline

    return pipeline.quantise(*options)


def validate(argv: list[str]) -> int:
    folders = [argument for argument in argv if not argument.startswith("-")]
    if len(folders) != 1 or set(argv) - {*folders, "--json", "--debug"}:
        raise ToolkitError("give one folder: python -m quant validate DIR [--json]")
    from quant.validate.command import print_findings

    return print_findings(folders[0], "--json" in argv)


def compress(argv: list[str]) -> int:
    (options,) = Parser(
        "python -m quant compress",
        "--model DIR --out DIR [-tp N]",
        "Compresses a W8A8S folder to W8A8SC with msmodelslim's Compressor, a folder for every rank. It needs "
        "msmodelslim's compressor binary, which CANN builds.",
        {"compression": CompressOptions},
    ).parse(argv)
    from . import compress as command

    return command.compress(options)


if __name__ == "__main__":
    sys.exit(run_command(main))
