"""The files that an atc command names.

Takes an artifact with a verified vision.onnx, writes beside it atc.sh, the AIPP file, the list for
mixed precision and the graph made for ATC, which is verified against vision.onnx.
"""

import os
from pathlib import Path

from convert.verify.comparison import compare
from models.family import Family
from models.files import private_file
from runtime.common.errors import CHECK_FAILED, ToolkitError
from runtime.common.files import write_atomically

from . import golden_features
from .aipp import aipp_config
from .command import AIPP, MIXLIST, SCRIPT, VARIANT, OmRequest, atc_command, atc_script, mixlist
from .graph_variant import write_variant
from .option_rules import MIXED


def write_atc_inputs(family: Family, artifact_dir: Path, request: OmRequest):
    """ToolkitError (exit 1) if the graph made for ATC computes something else than vision.onnx."""
    if request.aipp:
        write_atomically(artifact_dir / AIPP, aipp_config(family))
    if request.graph == VARIANT:
        _write_verified_variant(family, artifact_dir, request)
    if any(mode.startswith(MIXED) for mode in request.modes):
        write_atomically(artifact_dir / MIXLIST, mixlist())
    command = atc_command(request, family, request.modes[0])
    write_atomically(artifact_dir / SCRIPT, atc_script(command))


def _write_verified_variant(family: Family, artifact_dir: Path, request: OmRequest):
    """A variant that is there already was verified when it was written."""
    variant = artifact_dir / VARIANT
    with private_file(variant) as candidate:
        write_variant(family, artifact_dir, request, candidate)
        if variant.is_file() and candidate.read_bytes() == variant.read_bytes():
            return
        _verify_variant(family, artifact_dir, request, candidate)
        os.replace(candidate, variant)


def _verify_variant(family: Family, artifact_dir: Path, request: OmRequest, candidate: Path):
    aipp = artifact_dir / AIPP if request.aipp else None
    features = golden_features.features(family, candidate, aipp)
    result = compare(golden_features.golden(family, artifact_dir), features)
    print(f"verify {VARIANT}: {result.verdict}")
    if not result.passed:
        raise ToolkitError(
            f"{VARIANT} and vision.onnx disagree; report this with the line above", CHECK_FAILED
        )
