"""Vision features that fail: which module or ONNX node of the encoder departs first.

A candidate's side and the findings flow in; `python -m convert.nodes` runs as a process of its own against the reference's
checkpoint and leaves its table, nodes.csv, in the report's folder; one sentence flows out, into the verdict too.
"""

import csv
import subprocess
from pathlib import Path

from runtime.common.progress import spinner

ARTIFACT = ", artifact "  # how OnnxVision.describe ends


def find(options, candidate, found: dict, out: Path) -> str | None:
    """None where the vision features pass; for an .om, what to do."""
    if all(c["passed"] for c in found["checks"] if c["stage"] == "vision"):
        return None
    stage = next(line for line in candidate.info["stages"] if line.startswith("vision: "))
    if stage.startswith("vision: om"):
        return "python -m convert.nodes --dump names the operator of an .om"
    side = (
        ["--artifact", Path(stage.partition(ARTIFACT)[2]).absolute()]
        if ARTIFACT in stage
        else ["--candidate", Path(options.model).absolute()]
    )
    first = first_that_departs(options, side, out / "nodes.csv")
    if first is None:
        return "no module of the encoder departs on the drawn picture of python -m convert.nodes; give it --image"
    sentence = (
        f"inside the encoder {first['NPUDump']} ({first['OpType']}) is the first that departs"
    )
    found["verdict"] += f"; {sentence}"
    found["verdict_zh"] += f"；编码器内部首先偏离的节点：{first['NPUDump']}（{first['OpType']}）"
    return sentence


def first_that_departs(options, side: list, table: Path) -> dict | None:
    """Row of the table, which convert.nodes writes in the order of computation."""
    from runtime.common.processes import start_module

    picture = (
        ["--image", Path(options.image[0]).absolute()]
        if options.image and isinstance(options.image[0], str)
        else []
    )
    with spinner("looking into the vision encoder"):
        process = start_module(
            "convert.nodes",
            "--model",
            Path(options.reference).absolute(),
            *side,
            "--out",
            table.absolute(),
            *picture,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        process.wait()
    if not table.is_file():
        return None
    with open(table, encoding="utf-8", newline="") as lines:
        return next(
            (row for row in csv.DictReader(lines) if row["IsPrecisionError"] == "YES"), None
        )
