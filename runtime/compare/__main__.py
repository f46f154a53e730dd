"""`python -m runtime.compare`: is the candidate still the model that the reference is? Exit 0 yes,
1 no.

Takes a checkpoint and a candidate's options, returns report.json and report.html. The reference
(plain torch, fp32) answers a few questions greedily; its tokens are fed to both sides one by one,
and every step's logits are compared, as are the vision features, and every layer on the reference's
own input (runs.py, layerwise.py). What fails is looked into: the first vision module
(vision_nodes.py), the layers that must be kept in a wider form (float_search.py).
"""

from __future__ import annotations

import shlex
import sys

from models import family_of
from runtime.common import files, machine
from runtime.common.errors import CHECK_FAILED, run_command
from runtime.common.flags import Parser
from runtime.engine.command import check_images, join_torchrun
from runtime.engine.options import EngineOptions

from .cases import check_same_family, choose_cases
from .options import CompareOptions


def parser() -> Parser:
    return Parser(
        "python -m runtime.compare",
        "--model DIR --out DIR [--reference DIR] [options]",
        "Compare a candidate (the model, run with the options below) with the reference (plain torch, "
        "float32): logits token by token, and vision features. Exit code 0: within the threshold, 1: not.",
        {"what to compare": CompareOptions, "candidate": EngineOptions},
    )


def main(argv: list[str]) -> int:
    options, engine_options = parser().parse(argv)
    join_torchrun(engine_options)
    from .comparison import compare
    from .components import check_components
    from .report import page, terminal

    family = family_of(options.model)
    check_images(family, options.image)
    check_same_family(options, family)
    check_components(options, engine_options, family)
    out = files.prepare(options.out)
    cases = choose_cases(options, family)
    found = compare(options, engine_options, cases, out)
    found["command"] = shlex.join(["python", "-m", "runtime.compare", *argv])
    found["environment"] = machine.environment()
    page.write(found, [case.images for case in cases], out)
    terminal.show(found, out)
    return 0 if found["passed"] else CHECK_FAILED


if __name__ == "__main__":
    sys.exit(run_command(main))
