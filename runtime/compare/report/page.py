"""The precision report: a dict of findings flows in; report.json, layers.csv, one self-contained report.html and a table
flow out.

SCHEMA names the JSON layout (docs/compare.md); its version grows when a key changes meaning or goes. NaN is written as
null. Headings of the page are in labels.json, in every language.
"""

import base64
import csv
import io
import json
import math
import re
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path

from runtime.common.errors import ToolkitError
from runtime.common.msit import MSIT_COLUMNS

from .formats import cosine, cosine_limit, decimals, number, percent
from .plots import COLOURS, plots

SCHEMA = {"name": "ascend-vlm/compare", "version": 2}
WORST = 12
THUMBNAIL = 360  # pixels of a picture's longer edge in the page


def write(found: dict, pictures: list[list], out: Path):
    """Complete `found` and write report.html, then report.json. pictures: those of every case, path or PIL image."""
    found["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    found = plain(found)
    replace(out / "layers.csv", layers_csv(found))
    replace(out / "report.html", html(found, pictures))
    replace(
        out / "report.json", json.dumps(found, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    )


def layers_csv(found: dict) -> str:
    """Every stage under the columns that msit's compare writes; NPUDump is the candidate, GroundTruth the reference. The
    cosine is the smallest of a token; what is not measured here stays empty."""
    stored = io.StringIO()
    rows = csv.DictWriter(stored, MSIT_COLUMNS, restval="", lineterminator="\n")
    rows.writeheader()
    for index, s in enumerate(found["layers"]):
        rows.writerow(
            {
                "Index": index,
                "OpType": s["stage"].rpartition(".")[2],
                "NPUDump": s["stage"],
                "GroundTruth": s["stage"],
                "Overflow": "YES" if s["nonfinite"] else "NO",
                "CosineSimilarity": s["cosine_min"],
                "MaxAbsoluteError": s["max_abs"],
                "RelativeEuclideanDistance": s["relative_euclidean"],
                "MeanAbsoluteError": s["mean_abs"],
                "RootMeanSquareError": s["rmse"],
                "MaxRelativeError": s["max_relative"],
                "MeanRelativeError": s["mean_relative"],
                "CompareFailReason": "",
                "IsNpuOps": "NO",
                "IsOutputNode": "YES" if index == len(found["layers"]) - 1 else "NO",
                "IsPrecisionError": "NO" if s["passed"] else "YES",
            }
        )
    return stored.getvalue()


def plain(value):
    """The same, with None for NaN and Inf: JSON has no such numbers."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace(path: Path, text: str):
    from runtime.common.files import write_atomically

    try:
        write_atomically(path, text)
    except OSError as error:
        raise ToolkitError(
            f"{path} cannot be written ({error.strerror}); make room or give another --out, "
            "then run again"
        ) from None


# the terminal


# the page


def html(found: dict, pictures: list[list]) -> str:
    import jinja2

    templates = resources.files(__package__) / "templates"
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {
        "cosine": cosine,
        "number": number,
        "percent": percent,
        "visible": visible,
        "gain": decimals(".6f"),
        "limit": decimals(".4g"),
        "round4": decimals(".4f"),
    }
    page = environment.from_string((templates / "compare.html").read_text(encoding="utf-8"))
    labels = json.loads((templates / "labels.json").read_text(encoding="utf-8"))
    both = {name: in_both(labels, name) for name in labels["en"] if name != "how_text"}
    how = [
        in_both({"en": {0: en}, "zh": {0: zh}}, 0)
        for en, zh in zip(labels["en"]["how_text"], labels["zh"]["how_text"])
    ]
    return page.render(
        report=found,
        t=both,
        how=how,
        limit=cosine_limit(found) or 0,
        colours=COLOURS,
        worst=worst_tokens(found),
        plots=plots(found, both),
        pictures=[[thumbnail(p) for p in some] for some in pictures],
    )


def in_both(labels: dict, name):
    """The label in both languages; the page shows one of them."""
    from markupsafe import Markup

    both = Markup('<span class="en">{}</span><span class="zh" lang="zh">{}</span>')
    return both.format(labels["en"][name], labels["zh"][name])


def worst_tokens(found: dict) -> list[dict]:
    """Tokens of the smallest cosines (NaN first), with their place."""
    tokens = [
        {**token, "case": index, "row": row, "question": case["question"]}
        for index, case in enumerate(found["cases"])
        for row, token in enumerate(case["tokens"])
    ]
    return sorted(tokens, key=lambda t: -2 if t["cosine"] is None else t["cosine"])[:WORST]


def visible(text: str) -> str:
    """Token text with its blanks and control characters made visible."""
    shown = re.sub(" {4,}", lambda blanks: f"␣×{len(blanks[0])}", text).translate(
        {32: "␣", 10: "⏎", 9: "⇥"}
    )
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown) or "∅"


def thumbnail(picture) -> str:
    """data: URI of a small JPEG."""
    from models.prompt.images import open_image

    image = open_image(picture).copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stored.getvalue()).decode()
