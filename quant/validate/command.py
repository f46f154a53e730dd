"""The command behind `python -m quant validate`.

Takes a folder, prints the findings, returns the exit code.
"""

import json
from pathlib import Path

from models.terminal import for_stdout
from runtime.common.errors import CHECK_FAILED
from runtime.common.files import check_again

from .findings import CONSUMERS, Finding, Findings
from .folder import validate

SHOWN = 12


def print_findings(folder: str, as_json: bool) -> int:
    """0 if the folder is sound and some consumer loads it, else CHECK_FAILED."""
    with check_again():
        findings = validate(Path(folder))
    loads = {consumer: findings.loads(consumer) for consumer in CONSUMERS}
    if as_json:
        print(json.dumps({"loads": loads, "findings": [vars(f) for f in findings.found]}, indent=2))
    else:
        _print_text(findings, loads)
    return 0 if any(loads.values()) and not findings.problems else CHECK_FAILED


def _print_text(findings: Findings, loads: dict[str, bool]):
    for finding in findings.found[:SHOWN]:
        print(for_stdout(_as_line(finding)))
    if len(findings.found) > SHOWN:
        print(f"and {len(findings.found) - SHOWN} more; --json lists them")
    for consumer, fits in loads.items():
        print(f"{consumer}: {'files fit' if fits else 'files do not fit'}")


def _as_line(finding: Finding) -> str:
    if not finding.stops:
        return f"note: {finding.text}"
    if len(finding.stops) == len(CONSUMERS):
        return f"problem: {finding.text}"
    return f"problem: {finding.text} (stops {', '.join(finding.stops)})"
