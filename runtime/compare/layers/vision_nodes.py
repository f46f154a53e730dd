"""Finds the first module or ONNX node of the vision encoder that deviates, where vision features
fail.

Takes the findings, adds one sentence to them and to their verdict. `python -m convert.nodes` runs
as a process of its own against the reference's checkpoint and leaves its table, nodes.csv, in the
report's folder.
"""

import csv
import subprocess
from pathlib import Path

from runtime.common.processes import start_module
from runtime.common.progress import spinner
from runtime.compare.options import CompareOptions

ARTIFACT = ", artifact "  # how OnnxVision.describe ends


def look_into(options: CompareOptions, found: dict, out: Path):
    """Sets found["vision_node"]; for an .om, which cannot be looked into here, to the command that
    can."""
    stages = found["candidate"]["stages"]
    stage = next(line for line in stages if line.startswith("vision: "))
    if stage.startswith("vision: om"):
        found["vision_node"] = "python -m convert.nodes --dump names the operator of an .om"
        return
    first = _first_that_deviates(options, stage, out / "nodes.csv")
    if first is None:
        found["vision_node"] = (
            "no module of the encoder deviates on the drawn picture of python -m convert.nodes; "
            "give it --image"
        )
        return
    node = first["NPUDump"]
    kind = first["OpType"]
    found["vision_node"] = f"inside the encoder {node} ({kind}) is the first that deviates"
    found["verdict"] += f"; {found['vision_node']}"
    found["verdict_zh"] += f"；编码器内部首先偏离的节点：{node}（{kind}）"


def _first_that_deviates(options: CompareOptions, stage: str, table: Path) -> dict | None:
    """Row of the table, which convert.nodes writes in the order of computation."""
    _write_nodes(options, stage, table)
    if not table.is_file():
        return None
    with open(table, encoding="utf-8", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["IsPrecisionError"] == "YES":
                return row
    return None


def _write_nodes(options: CompareOptions, stage: str, table: Path):
    """Runs convert.nodes on the artifact that `stage` names, else on the candidate's checkpoint."""
    arguments = ["--model", Path(options.reference).absolute()]
    if ARTIFACT in stage:
        arguments += ["--artifact", Path(stage.partition(ARTIFACT)[2]).absolute()]
    else:
        arguments += ["--candidate", Path(options.model).absolute()]
    arguments += ["--out", table.absolute()]
    if options.image and isinstance(options.image[0], str):
        arguments += ["--image", Path(options.image[0]).absolute()]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with spinner("looking into the vision encoder"):
        start_module("convert.nodes", *arguments, **silent).wait()
