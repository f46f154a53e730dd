"""The files of a precision report.

Takes the findings (a dict), returns report.json, layers.csv and one self-contained report.html.
SCHEMA names the JSON layout (docs/compare.md); its version grows when a key changes meaning or
goes. NaN is written as null. Headings of the page are in labels.json, in every language.
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

from models.prompt.images import open_image
from runtime.common.errors import ToolkitError
from runtime.common.files import write_atomically
from runtime.common.msit import MSIT_COLUMNS

from .formats import cosine, cosine_limit, decimals, number, percent
from .plots import COLOURS, plots

SCHEMA = {"name": "ascend-vlm/compare", "version": 2}
WORST = 12
THUMBNAIL = 360  # pixels of an image's longer edge in the page
SPAN = '<span class="en">{}</span><span class="zh" lang="zh">{}</span>'


def write(found: dict, images: list[list], out: Path):
    """Completes `found` and writes layers.csv, report.html, then report.json. images: of every
    case, paths or PIL images.

    ToolkitError if a file cannot be written.
    """
    found["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    found = plain(found)
    stored = json.dumps(found, ensure_ascii=False, indent=1, allow_nan=False)
    _write_file(out / "layers.csv", layers_csv(found))
    _write_file(out / "report.html", html(found, images))
    _write_file(out / "report.json", stored + "\n")


def layers_csv(found: dict) -> str:
    """Every stage as a row of msit's comparison table (common/msit.py); what is not measured here
    stays empty."""
    stored = io.StringIO()
    rows = csv.DictWriter(stored, MSIT_COLUMNS, restval="", lineterminator="\n")
    rows.writeheader()
    last = len(found["layers"]) - 1
    for index, stage in enumerate(found["layers"]):
        rows.writerow({"Index": index, **_msit_row(stage), "IsOutputNode": _yes_no(index == last)})
    return stored.getvalue()


def _msit_row(stage: dict) -> dict:
    """NPUDump is the candidate, GroundTruth the reference; cosine: the smallest of a token."""
    return {
        "OpType": stage["stage"].rpartition(".")[2],
        "NPUDump": stage["stage"],
        "GroundTruth": stage["stage"],
        "Overflow": _yes_no(stage["nonfinite"]),
        "CosineSimilarity": stage["cosine_min"],
        "MaxAbsoluteError": stage["max_abs"],
        "RelativeEuclideanDistance": stage["relative_euclidean"],
        "MeanAbsoluteError": stage["mean_abs"],
        "RootMeanSquareError": stage["rmse"],
        "MaxRelativeError": stage["max_relative"],
        "MeanRelativeError": stage["mean_relative"],
        "CompareFailReason": "",
        "IsNpuOps": "NO",
        "IsPrecisionError": _yes_no(not stage["passed"]),
    }


def _yes_no(value) -> str:
    return "YES" if value else "NO"


def plain(value):
    """The same, with None for NaN and Inf: JSON has no such numbers."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _write_file(path: Path, text: str):
    try:
        write_atomically(path, text)
    except OSError as error:
        raise ToolkitError(
            f"{path} cannot be written ({error.strerror}); make room or give another --out, "
            "then run again"
        ) from None


def html(found: dict, images: list[list]) -> str:
    """The page; images as of `write`."""
    templates = resources.files(__package__) / "templates"
    template = _environment().from_string((templates / "compare.html").read_text(encoding="utf-8"))
    labels = json.loads((templates / "labels.json").read_text(encoding="utf-8"))
    english = labels["en"]
    chinese = labels["zh"]
    how = []
    for paragraph in zip(english.pop("how_text"), chinese.pop("how_text")):
        how.append(in_both(*paragraph))
    both = {name: in_both(text, chinese[name]) for name, text in english.items()}
    thumbnails = []
    for some in images:
        thumbnails.append([thumbnail(image) for image in some])
    return template.render(
        report=found,
        t=both,
        how=how,
        limit=cosine_limit(found) or 0,
        colours=COLOURS,
        worst=worst_tokens(found),
        plots=plots(found, both),
        pictures=thumbnails,
    )


def _environment():
    import jinja2

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
    return environment


def in_both(english: str, chinese: str):
    """A label in both languages; the page shows one of them."""
    from markupsafe import Markup

    return Markup(SPAN).format(english, chinese)


def worst_tokens(found: dict) -> list[dict]:
    """Tokens of the smallest cosines (NaN first), with their place."""
    tokens = []
    for index, case in enumerate(found["cases"]):
        for row, token in enumerate(case["tokens"]):
            tokens.append({**token, "case": index, "row": row, "question": case["question"]})
    return sorted(tokens, key=_cosine_or_nan_first)[:WORST]


def _cosine_or_nan_first(token: dict) -> float:
    return -2 if token["cosine"] is None else token["cosine"]


def visible(text: str) -> str:
    """Token text with its blanks and control characters made visible."""
    shown = re.sub(" {4,}", lambda blanks: f"␣×{len(blanks[0])}", text)
    shown = shown.translate({32: "␣", 10: "⏎", 9: "⇥"})
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown)
    return shown or "∅"


def thumbnail(picture) -> str:
    """data: URI of a small JPEG of an image (path or PIL image)."""
    image = open_image(picture).copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stored.getvalue()).decode()
