"""msit's table. Takes the comparisons, returns CSV text; its column NPUDump is the candidate."""

import csv
import io

from runtime.common.msit import MSIT_COLUMNS

from .comparison import NodeComparison
from .limits import passes


def msit_table(nodes: list[NodeComparison], limits: dict[str, float]) -> str:
    text = io.StringIO()
    rows = csv.DictWriter(text, MSIT_COLUMNS, restval="", lineterminator="\n")
    rows.writeheader()
    for node in nodes:
        row = {
            "Index": node.index,
            "OpType": node.operator,
            "NPUDump": node.candidate,
            "DataType": node.dtype,
            "GroundTruth": node.golden,
            "TensorIndex": node.output,
            "CompareFailReason": node.reason,
            "IsNpuOps": _yes_no(node.golden == "*"),
            "IsOutputNode": _yes_no(node is nodes[-1]),
            "IsPrecisionError": _yes_no(not passes(node, limits)),
        }
        if node.measures:
            row |= _measured(node.measures)
        rows.writerow(row)
    return text.getvalue()


def _yes_no(value: bool) -> str:
    return "YES" if value else "NO"


def _measured(measures: dict) -> dict:
    (mean, std), (golden_mean, golden_std) = measures["moments"]
    return {
        "Shape": measures["shape"],
        "Overflow": _yes_no(measures["nonfinite"]),
        "CosineSimilarity": measures["cosine_min"],
        "MaxAbsoluteError": measures["max_abs"],
        "AccumulatedRelativeError": measures["accumulated"],
        "RelativeEuclideanDistance": measures["relative_euclidean"],
        "KullbackLeiblerDivergence": measures["kl"],
        "StandardDeviation": f"({mean:.6g};{std:.6g}),({golden_mean:.6g};{golden_std:.6g})",
        "MeanAbsoluteError": measures["mean_abs"],
        "RootMeanSquareError": measures["rmse"],
        "MaxRelativeError": measures["max_relative"],
        "MeanRelativeError": measures["mean_relative"],
    }
