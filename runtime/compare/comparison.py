"""A whole comparison: both sides run, are judged, and what fails is looked into.

Takes the options and the questions, returns the findings of the report.
"""

import gc
from pathlib import Path
from tempfile import TemporaryDirectory

from models.checkpoint import Checkpoint
from runtime.common.files import check_again
from runtime.common.notes import note
from runtime.common.progress import print_status
from runtime.compare.layers.scales import judge_scales
from runtime.engine.options import EngineOptions
from runtime.vision import remember_verified
from runtime.vision.source import Source

from . import dataset
from .cases import Case
from .layers import float_search, vision_nodes
from .limits import all_limits
from .options import CompareOptions
from .outcomes import Side
from .runs import is_quantised, run_candidate, run_reference
from .verdict import judge


def compare(
    options: CompareOptions, engine_options: EngineOptions, cases: list[Case], out: Path
) -> dict:
    """What the report says (keys: docs/compare.md); `out` holds work files for the time being."""
    with check_again(), TemporaryDirectory(prefix=".streams-", dir=out) as work:
        reference = run_reference(options, engine_options.max_model_len, cases, Path(work))
        gc.collect()  # one model in memory at a time
        candidate = run_candidate(options, engine_options, cases, reference)
    limits = all_limits(options.threshold, options.limit, _is_rounded(options, engine_options))
    scales = judge_scales(options.model, options.reference)
    found = judge(reference, candidate, cases, limits, scales)
    found |= {"dataset": None, "vision_node": None, "culprit": None}
    if options.questions:
        found["dataset"] = dataset.summary(
            options.dataset, options.questions, reference.answers, candidate.answers
        )
    if _fails(found, "vision") and not options.native:
        vision_nodes.look_into(options, found, out)
    if _fails(found, "decode") and options.search and found["layers"]:
        found["culprit"] = float_search.find(
            options, engine_options, cases, reference.outcomes, found
        )
    found["options"] = {"max_tokens": options.max_tokens}
    if found["passed"] and candidate.unverified:
        _remember(options, candidate, found["stages"]["vision"])
    return found


def _remember(options: CompareOptions, candidate: Side, vision: dict):
    """An encoder that passed, held against torch with its own weights, counts as verified."""
    own_weights = options.native or Path(options.model).samefile(options.reference)
    if not vision["rows"] or not own_weights:
        return
    source = Source(candidate.family, Checkpoint(options.model))
    try:
        remember_verified(
            candidate.unverified, source, vision["cosine_min"], vision["relative_euclidean"]
        )
    except OSError as error:
        note(f"that {candidate.unverified} passed cannot be remembered ({error.strerror})")
        return
    print_status(f"{candidate.unverified} passed, and counts as verified from now on")


def _is_rounded(options: CompareOptions, engine_options: EngineOptions) -> bool:
    """Whether the candidate's weights are rounded to 8 or 4 bits and the reference's are not."""
    if engine_options.cpu_weights != "float":
        return True
    if not is_quantised(options.model):
        return False
    return options.native or not is_quantised(options.reference)


def _fails(found: dict, stage: str) -> bool:
    checks = [check for check in found["checks"] if check["stage"] == stage]
    return not all(check["passed"] for check in checks)
