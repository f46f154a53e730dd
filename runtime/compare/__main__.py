"""`python -m runtime.compare`: is the candidate still the model that the reference is? Exit 0 yes, 1 no.

A checkpoint and a candidate's options flow in; report.json and report.html flow out. The reference (plain torch, fp32)
answers a few questions greedily; its tokens are fed to both sides one by one, and every step's logits are compared, as
are the vision features, and every layer on the reference's own input (sides.py, layers.py). What fails is looked into:
the first vision module (inside.py), the layers that must be kept in a wider form (culprit.py).
"""

from __future__ import annotations

import gc
import shlex
import sys
import tempfile
from pathlib import Path

from runtime.common import files, machine
from runtime.common.errors import CHECK_FAILED, run_command
from runtime.common.flags import Parser
from runtime.engine.command import check_pictures, join_torchrun
from runtime.engine.options import EngineOptions

from .cases import check_same_family, choose_cases
from .dataset import summary as dataset_summary
from .limits import all_limits
from .options import CompareOptions
from .report import page as report
from .report import terminal
from .runs import run_candidate, run_reference


def parser() -> Parser:
    return Parser(
        "python -m runtime.compare",
        "--model DIR --out DIR [--reference DIR] [options]",
        "Compare a candidate (the model, run with the options below) with the reference (plain torch, "
        "float32): logits token by token, and vision features. Exit code 0: within the threshold, 1: not.",
        {"what to compare": CompareOptions, "candidate": EngineOptions},
    )


def main(argv) -> int:
    options, candidate_options = parser().parse(argv)
    join_torchrun(candidate_options)
    from models import family_of

    family = family_of(options.model)
    check_pictures(family, options.image)
    check_same_family(options, family)
    out = files.prepare(options.out)
    found, pictures = findings(options, candidate_options, out)
    found |= {
        "command": shlex.join(["python", "-m", "runtime.compare", *argv]),
        "environment": machine.environment(),
    }
    report.write(found, pictures, out)
    terminal.show(found, out)
    return 0 if found["passed"] else CHECK_FAILED


def findings(
    options: CompareOptions, candidate_options: EngineOptions, out: Path
) -> tuple[dict, list[list]]:
    """What the report says, and the pictures of every question; `out` receives work files for the time being."""
    from models import family_of

    from . import float_search as culprit
    from . import vision_nodes as inside
    from .verdict import judge

    cases = choose_cases(options, family_of(options.model))
    with tempfile.TemporaryDirectory(prefix=".streams-", dir=out) as work:
        reference = run_reference(options, candidate_options.max_model_len, cases, Path(work))
        gc.collect()  # one model in memory at a time
        candidate = run_candidate(options, candidate_options, cases, reference)
    found = judge(
        reference, candidate, cases, all_limits(options, candidate_options.cpu_weights != "float")
    )
    found["dataset"] = (
        dataset_summary(options.dataset, options.questions, reference.answers, candidate.answers)
        if options.questions
        else None
    )
    found["vision_node"] = None if options.native else inside.find(options, candidate, found, out)
    found["culprit"] = (
        culprit.find(options, candidate_options, cases, reference, found)
        if options.search
        else None
    )
    return {**found, "options": {"max_tokens": options.max_tokens}}, [
        case.pictures for case in cases
    ]


if __name__ == "__main__":
    sys.exit(run_command(main))
