"""Plots of a comparison as SVG.

Takes the findings and the labels of the page, returns figures as text.
"""

import io
import math
import re
from collections.abc import Callable

from .formats import cosine_limit

# one per question; people who see few colours tell them apart
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
RED = "#c62828"
FLOOR = 1e-17  # smallest 1 - cosine a float64 cosine can show, and what a plot draws for less
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ascend-vlm",
    "font.size": 9,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def plots(found: dict, labels: dict) -> list[dict]:
    """[{title, svg}]: every measure over the tokens of all questions, the layers' errors, and how
    large errors are."""
    drawn = []

    def add(label: str, draw: Callable, *what):
        drawn.append({"title": labels[label], "svg": svg(draw, *what)})

    if found["layers"]:
        add("plot_layers", draw_lines, [_series(found["layers"], n) for n in ("relative", "limit")])
    limit = cosine_limit(found)
    distance = None if limit is None else 1 - limit
    add("plot_cosine", draw_lines, _distances(found["cases"]), distance)
    for name in ("kl", "max_abs", "mean_abs"):
        add(f"plot_{name}", draw_lines, [_series(case["tokens"], name) for case in found["cases"]])
    if any(found["histogram"]["counts"]):
        add("plot_histogram", draw_histogram, found["histogram"])
    return drawn


def _series(rows: list[dict], name: str) -> list:
    return [row[name] for row in rows]


def _distances(cases: list[dict]) -> list[list]:
    """1 - cosine of every token of every case, None for NaN."""
    found = []
    for case in cases:
        cosines = _series(case["tokens"], "cosine")
        found.append([None if cosine is None else 1 - cosine for cosine in cosines])
    return found


def svg(draw: Callable, *what) -> str:
    """The figure that draw(axes, *what) makes; text stays text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # matplotlib reads a matplotlibrc of the current folder
        matplotlib.rcParams.update(STYLE)
        figure = FigureCanvasSVG(Figure(figsize=(4.6, 2.5))).figure
        axes = figure.add_axes((0.14, 0.17, 0.84, 0.78))  # a layout engine takes seconds
        draw(axes, *what)
        stored = io.StringIO()
        no_metadata = {"Date": None, "Creator": None}
        figure.savefig(stored, format="svg", transparent=True, metadata=no_metadata)
    drawn = re.sub(r"(?s)<metadata>.*?</metadata>", "", stored.getvalue())
    return drawn[drawn.index("<svg") :]  # no XML head inside a page


def draw_lines(axes, series: list[list], limit: float | None = None):
    """One line per question over its tokens, logarithmic; red marks where a value is NaN."""
    for index, values in enumerate(series):
        _draw_line(axes, values, COLOURS[index % len(COLOURS)])
    if limit:
        axes.axhline(limit, color=RED, linewidth=1, linestyle="--")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # 1e-04 as in the tables; 10⁻⁴ takes a second per plot
    axes.yaxis.set_major_formatter(lambda y, _: power(y))
    axes.yaxis.set_minor_formatter(lambda y, _: power(y) if high < 10 * low else "")
    axes.grid(True, alpha=0.25, linewidth=0.5)


def _draw_line(axes, values: list[float | None], colour: str):
    place = range(1, len(values) + 1)
    shown = []
    missing = []
    for at, value in zip(place, values):
        if value is None:
            missing.append(at)
            shown.append(math.nan)
        else:
            shown.append(max(value, FLOOR))
    axes.plot(place, shown, marker=".", markersize=4, linewidth=1, color=colour)
    top = [0.97] * len(missing)
    axes.plot(missing, top, "x", color=RED, transform=axes.get_xaxis_transform())


def power(value: float) -> str:
    """Of a tick: "1e-04", "2.5e-04"."""
    short = f"{value:.0e}"
    if math.isclose(float(short), value, rel_tol=1e-6):
        return short
    return f"{value:.1e}"


def draw_histogram(axes, histogram: dict):
    """counts [n] over powers of ten, edges [n + 1]."""
    edges = histogram["edges"]
    counts = histogram["counts"]
    axes.bar(edges[:-1], counts, width=edges[1] - edges[0], align="edge", color=COLOURS[0])
    axes.set_yscale("symlog")
    axes.set_yticks([10**p for p in range(0, 9, 2) if 10**p <= 10 * max(counts)])
    axes.xaxis.set_major_formatter(lambda x, _: f"1e{x:.0f}" if x == round(x) else "")
    axes.yaxis.set_major_formatter(lambda y, _: _count(y))
    axes.yaxis.set_minor_formatter(lambda y, _: "")


def _count(value: float) -> str:
    """ "1,000", "10 M" """
    return f"{value:,.0f}" if value < 1e6 else f"{value / 1e6:,.0f} M"
