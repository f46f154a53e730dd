"""`python -m quant`: a float checkpoint in, a quantised checkpoint that MindIE and vllm-ascend load out.

Steps: measure, quantise layer by layer with msmodelslim, judge, publish. A killed run goes on behind its last layer;
nothing that looks finished is written unless the quality gate holds. `python -m quant validate DIR` checks a directory.
"""

import sys

from runtime.common.errors import ToolkitError, run_command
from runtime.common.flags import Parser

from .options import CalibrationOptions, CompressOptions, GateOptions, QuantOptions, RecipeOptions


def parser() -> Parser:
    return Parser(
        "python -m quant",
        "--model DIR --out DIR [options] | validate DIR | compress --model DIR --out DIR",
        "Quantises the language model of a checkpoint with msmodelslim, layer by layer, proves it against the "
        "float model and writes what MindIE and vllm-ascend load. `validate DIR` checks such a folder instead; "
        "`compress` makes W8A8SC of W8A8S, for the 310P.",
        {
            "quantisation": QuantOptions,
            "calibration": CalibrationOptions,
            "recipe": RecipeOptions,
            "quality gate": GateOptions,
        },
    )


def main(argv: list[str]) -> int:
    if argv[:1] == ["validate"]:
        return validate(argv[1:])
    if argv[:1] == ["compress"]:
        return compress(argv[1:])
    options = parser().parse(argv)
    from .pipeline import produce

    return produce(*options)


def validate(argv: list[str]) -> int:
    folders = [argument for argument in argv if not argument.startswith("-")]
    if len(folders) != 1 or set(argv) - {*folders, "--json", "--debug"}:
        raise ToolkitError("give one folder: python -m quant validate DIR [--json]")
    from .validate import report

    return report(folders[0], "--json" in argv)


def compress(argv: list[str]) -> int:
    (options,) = Parser(
        "python -m quant compress",
        "--model DIR --out DIR [-tp N]",
        "Compresses a W8A8S folder to W8A8SC with msmodelslim's Compressor, a folder for every rank. It needs "
        "msmodelslim's compressor binary, which CANN builds.",
        {"compression": CompressOptions},
    ).parse(argv)
    from .compress import compress as run

    return run(options)


if __name__ == "__main__":
    sys.exit(run_command(main))
