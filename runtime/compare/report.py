"""The precision report: a dict of findings flows in; report.json, layers.csv, one self-contained report.html and a table
flow out.

SCHEMA names the JSON layout (docs/compare.md); its version grows when a key changes meaning or goes. NaN is written as
null. Headings of the page are in labels.json, in every language.
"""
import base64
import contextlib
import csv
import io
import json
import math
import platform
import re
import sys
import tempfile
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path

from runtime.common.errors import ToolkitError

SCHEMA = {"name": "ascend-vlm/compare", "version": 2}
PACKAGES = ("ascend-vlm", "torch", "numpy", "onnx", "onnxruntime", "safetensors", "sentencepiece", "pillow")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")     # one per question, told apart by all
WORST = 12
# the columns of msit's comparison of dumps (two of them are called DataType: the second is ours to drop)
MSIT_COLUMNS = ("Index", "OpType", "NPUDump", "DataType", "Address", "GroundTruth", "TensorIndex", "Shape", "Overflow",
                "CosineSimilarity", "MaxAbsoluteError", "AccumulatedRelativeError", "RelativeEuclideanDistance",
                "KullbackLeiblerDivergence", "StandardDeviation", "MeanAbsoluteError", "RootMeanSquareError",
                "MaxRelativeError", "MeanRelativeError", "CompareFailReason", "IsNpuOps", "IsOutputNode", "IsPrecisionError")
THUMBNAIL = 360         # pixels of a picture's longer edge in the page
FLOOR = 1e-17           # smallest 1 - cosine a float64 cosine can show, and what a plot draws for less


def prepare(out: str) -> Path:
    """The folder of the report, made and tried before anything slow begins; ToolkitError if it cannot be written."""
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise ToolkitError(f"--out {out} cannot be written ({error.strerror}); give another folder") from None


def write(found: dict, pictures: list[list], out: Path):
    """Complete `found` and write report.html, then report.json. pictures: those of every case, path or PIL image."""
    found["created"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    found = plain(found)
    replace(out / "layers.csv", layers_csv(found))
    replace(out / "report.html", html(found, pictures))
    replace(out / "report.json", json.dumps(found, ensure_ascii=False, indent=1, allow_nan=False) + "\n")


def layers_csv(found: dict) -> str:
    """Every stage under the columns that msit's compare writes; NPUDump is the candidate, GroundTruth the reference. The
    cosine is the smallest of a token; what is not measured here stays empty."""
    stored = io.StringIO()
    rows = csv.DictWriter(stored, MSIT_COLUMNS, restval="", lineterminator="\n")
    rows.writeheader()
    for index, s in enumerate(found["layers"]):
        rows.writerow({"Index": index, "OpType": s["stage"].rpartition(".")[2], "NPUDump": s["stage"],
                       "GroundTruth": s["stage"], "Overflow": "YES" if s["nonfinite"] else "NO",
                       "CosineSimilarity": s["cosine_min"], "MaxAbsoluteError": s["max_abs"],
                       "RelativeEuclideanDistance": s["relative_euclidean"], "MeanAbsoluteError": s["mean_abs"],
                       "RootMeanSquareError": s["rmse"], "MaxRelativeError": s["max_relative"],
                       "MeanRelativeError": s["mean_relative"],
                       "CompareFailReason": "", "IsNpuOps": "NO",
                       "IsOutputNode": "YES" if index == len(found["layers"]) - 1 else "NO",
                       "IsPrecisionError": "NO" if s["passed"] else "YES"})
    return stored.getvalue()


def plain(value):
    """The same, with None for NaN and Inf: JSON has no such numbers."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def replace(path: Path, text: str):
    from runtime.vision.artifact import write_atomically
    try:
        write_atomically(path, text)
    except OSError as error:
        raise ToolkitError(f"{path} cannot be written ({error.strerror}); make room or give another --out, "
                           "then run again") from None


def environment() -> dict:
    """The machine and the versions that were used."""
    import torch
    versions = {name: version(name) for name in PACKAGES}
    return {"platform": platform.platform(), "cpu": cpu_name(), "threads": torch.get_num_threads(),
            "python": platform.python_version(), **{name: v for name, v in versions.items() if v}}


def version(package: str) -> str | None:
    from importlib import metadata
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]} ({len(names)} CPUs)" if names else platform.machine()
    return platform.processor() or platform.machine()


# the terminal

def say(text: str):
    print(text, file=sys.stderr, flush=True)


def track(role: str, cases: list, quiet: bool = False):
    """Iterate over the cases with a progress bar on stderr; quiet: each case shows one of its own."""
    from rich.console import Console
    from rich.progress import track as rich_track
    console = Console(stderr=True)
    return rich_track(cases, description=f"{role}: questions", console=console, transient=True,
                      disable=quiet or not console.is_terminal)


def show(found: dict, out: Path):
    """Summary table on stdout; the last two lines are the report's path and its verdict."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    console = Console()
    table = Table("stage", "rows", "cosine min", "max abs", "mean abs", "KL max", "top-1", box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, stage in found["stages"].items():
        table.add_row(name, *stage_cells(stage))
    console.print(table)
    if found["dataset"]:
        d = found["dataset"]
        console.print(f"dataset: {d['questions']} questions, right: reference {percent(d['reference'])}, candidate "
                      f"{percent(d['candidate'])}; same answer: {percent(d['same'])}", highlight=False)
    if found["culprit"]:
        console.print(f"search: {found['culprit']['sentence']}", soft_wrap=True, markup=False, highlight=False)
    for line in (f"report: {out / 'report.html'}", found["verdict"]):
        console.print(line, soft_wrap=True, markup=False, highlight=False,
                      style="" if line.startswith("report") else "bold green" if found["passed"] else "bold red")


def stage_cells(stage: dict) -> list[str]:
    if not stage["rows"]:
        return ["0", "not compared"]
    cells = [str(stage["rows"]), cosine(stage["cosine_min"]), number(stage["max_abs"]), number(stage["mean_abs"])]
    return cells + ([number(stage["kl_max"]), percent(stage["top1_agreement"])] if "kl_max" in stage else [])


def cosine(value: float | None) -> str:
    """Eight decimals, cut and not rounded: what is below a limit never looks like the limit."""
    return "NaN" if value is None or math.isnan(value) else f"{math.floor(value * 1e8) / 1e8:.8f}"


def number(value: float | None) -> str:
    return "NaN" if value is None or math.isnan(value) else "0" if value == 0 else f"{value:.2e}"


def decimals(form: str):
    return lambda value: "NaN" if value is None else format(value, form)


def percent(value: float) -> str:
    """Cut, not rounded: 100 % means all."""
    return f"{math.floor(value * 1000) / 10:g} %"


# the page

def html(found: dict, pictures: list[list]) -> str:
    import jinja2
    templates = resources.files(__package__) / "templates"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    environment.filters |= {"cosine": cosine, "number": number, "percent": percent, "visible": visible,
                            "gain": decimals(".6f"), "limit": decimals(".4g"), "round4": decimals(".4f")}
    page = environment.from_string((templates / "compare.html").read_text(encoding="utf-8"))
    labels = json.loads((templates / "labels.json").read_text(encoding="utf-8"))
    both = {name: in_both(labels, name) for name in labels["en"] if name != "how_text"}
    how = [in_both({"en": {0: en}, "zh": {0: zh}}, 0) for en, zh in zip(labels["en"]["how_text"], labels["zh"]["how_text"])]
    return page.render(report=found, t=both, how=how, limit=cosine_limit(found) or 0, colours=COLOURS,
                       worst=worst_tokens(found), plots=plots(found, both),
                       pictures=[[thumbnail(p) for p in some] for some in pictures])


def in_both(labels: dict, name):
    """The label in both languages; the page shows one of them."""
    from markupsafe import Markup
    both = Markup('<span class="en">{}</span><span class="zh" lang="zh">{}</span>')
    return both.format(labels["en"][name], labels["zh"][name])


def worst_tokens(found: dict) -> list[dict]:
    """Tokens of the smallest cosines (NaN first), with their place."""
    tokens = [{**token, "case": index, "row": row, "question": case["question"]} for index, case in enumerate(found["cases"])
              for row, token in enumerate(case["tokens"])]
    return sorted(tokens, key=lambda t: -2 if t["cosine"] is None else t["cosine"])[:WORST]


def visible(text: str) -> str:
    """Token text with its blanks and control characters made visible."""
    shown = re.sub(" {4,}", lambda blanks: f"␣×{len(blanks[0])}", text).translate({32: "␣", 10: "⏎", 9: "⇥"})
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in shown) or "∅"


def thumbnail(picture) -> str:
    """data: URI of a small JPEG."""
    from models.prompt.images import open_image
    image = open_image(picture).copy()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stored.getvalue()).decode()


def plots(found: dict, labels: dict) -> list[dict]:
    """[{title, svg}]: every measure over the tokens of all questions, the layers' errors, and how large errors are."""
    limit, cases = cosine_limit(found), found["cases"]
    distance = [[None if t["cosine"] is None else 1 - t["cosine"] for t in case["tokens"]] for case in cases]
    drawn = [(labels["plot_cosine"], svg(draw, distance, None if limit is None else 1 - limit))]
    drawn += [(labels[f"plot_{name}"], svg(draw, [[t[name] for t in case["tokens"]] for case in cases]))
              for name in ("kl", "max_abs", "mean_abs")]
    if found["layers"]:
        errors = [[stage[name] for stage in found["layers"]] for name in ("relative", "limit")]
        drawn.insert(0, (labels["plot_layers"], svg(draw, errors)))
    if any(found["histogram"]["counts"]):
        drawn.append((labels["plot_histogram"], svg(draw_histogram, found["histogram"])))
    return [{"title": title, "svg": figure} for title, figure in drawn]


def cosine_limit(found: dict) -> float | None:
    """Of the logits."""
    return next((c["limit"] for c in found["checks"] if (c["stage"], c["measure"]) == ("decode", "cosine_min")), None)


def svg(draw, *what) -> str:
    """The figure that draw(axes, *what) makes; text stays text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    style = {"svg.fonttype": "none", "svg.hashsalt": "ascend-vlm", "font.size": 9, "font.family": "sans-serif",
             "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 2.5))
        axes = FigureCanvasSVG(figure).figure.add_axes((0.14, 0.17, 0.84, 0.78))    # a layout engine takes seconds
        draw(axes, *what)
        stored = io.StringIO()
        figure.savefig(stored, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = re.sub(r"(?s)<metadata>.*?</metadata>", "", stored.getvalue())
    return drawn[drawn.index("<svg"):]          # no XML head inside a page


def draw(axes, series: list[list], limit: float | None = None):
    """One line per question over its tokens, logarithmic; red marks where a value is NaN."""
    for index, values in enumerate(series):
        place = range(1, len(values) + 1)
        axes.plot(place, [math.nan if v is None else max(v, FLOOR) for v in values], marker=".", markersize=4,
                  linewidth=1, color=COLOURS[index % len(COLOURS)])
        missing = [at for at, v in zip(place, values) if v is None]
        axes.plot(missing, [0.97] * len(missing), "x", color="#c62828", transform=axes.get_xaxis_transform())
    if limit:
        axes.axhline(limit, color="#c62828", linewidth=1, linestyle="--")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(lambda y, _: power(y))       # 1e-04 as in the tables; 10⁻⁴ takes a second per plot
    axes.yaxis.set_minor_formatter(lambda y, _: power(y) if high < 10 * low else "")
    axes.grid(True, alpha=0.25, linewidth=0.5)


def power(value: float) -> str:
    """Of a tick: "1e-04", "2.5e-04"."""
    short = f"{value:.0e}"
    return short if math.isclose(float(short), value, rel_tol=1e-6) else f"{value:.1e}"


def draw_histogram(axes, histogram: dict):
    """counts over powers of ten, edges [n + 1]."""
    edges = histogram["edges"]
    axes.bar(edges[:-1], histogram["counts"], width=edges[1] - edges[0], align="edge", color=COLOURS[0])
    axes.set_yscale("symlog")
    axes.set_yticks([10 ** p for p in range(0, 9, 2) if 10 ** p <= 10 * max(histogram["counts"])])
    axes.xaxis.set_major_formatter(lambda x, _: f"1e{x:.0f}" if x == round(x) else "")
    axes.yaxis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x < 1e6 else f"{x / 1e6:,.0f} M")
    axes.yaxis.set_minor_formatter(lambda x, _: "")
