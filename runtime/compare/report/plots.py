"""Plots of a comparison as SVG."""

import io
import math
import re

from .formats import cosine_limit

COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # one per question, told apart by all
FLOOR = 1e-17  # smallest 1 - cosine a float64 cosine can show, and what a plot draws for less


def plots(found: dict, labels: dict) -> list[dict]:
    """[{title, svg}]: every measure over the tokens of all questions, the layers' errors, and how large errors are."""
    limit = cosine_limit(found)
    cases = found["cases"]
    distance = [
        [None if t["cosine"] is None else 1 - t["cosine"] for t in case["tokens"]] for case in cases
    ]
    drawn = [(labels["plot_cosine"], svg(draw, distance, None if limit is None else 1 - limit))]
    drawn += [
        (labels[f"plot_{name}"], svg(draw, [[t[name] for t in case["tokens"]] for case in cases]))
        for name in ("kl", "max_abs", "mean_abs")
    ]
    if found["layers"]:
        errors = [[stage[name] for stage in found["layers"]] for name in ("relative", "limit")]
        drawn.insert(0, (labels["plot_layers"], svg(draw, errors)))
    if any(found["histogram"]["counts"]):
        drawn.append((labels["plot_histogram"], svg(draw_histogram, found["histogram"])))
    return [{"title": title, "svg": figure} for title, figure in drawn]


def svg(draw, *what) -> str:
    """The figure that draw(axes, *what) makes; text stays text."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "ascend-vlm",
        "font.size": 9,
        "font.family": "sans-serif",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.6, 2.5))
        axes = FigureCanvasSVG(figure).figure.add_axes(
            (0.14, 0.17, 0.84, 0.78)
        )  # a layout engine takes seconds
        draw(axes, *what)
        stored = io.StringIO()
        figure.savefig(
            stored, format="svg", transparent=True, metadata={"Date": None, "Creator": None}
        )
    drawn = re.sub(r"(?s)<metadata>.*?</metadata>", "", stored.getvalue())
    return drawn[drawn.index("<svg") :]  # no XML head inside a page


def draw(axes, series: list[list], limit: float | None = None):
    """One line per question over its tokens, logarithmic; red marks where a value is NaN."""
    for index, values in enumerate(series):
        place = range(1, len(values) + 1)
        axes.plot(
            place,
            [math.nan if v is None else max(v, FLOOR) for v in values],
            marker=".",
            markersize=4,
            linewidth=1,
            color=COLOURS[index % len(COLOURS)],
        )
        missing = [at for at, v in zip(place, values) if v is None]
        axes.plot(
            missing,
            [0.97] * len(missing),
            "x",
            color="#c62828",
            transform=axes.get_xaxis_transform(),
        )
    if limit:
        axes.axhline(limit, color="#c62828", linewidth=1, linestyle="--")
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_formatter(
        lambda y, _: power(y)
    )  # 1e-04 as in the tables; 10⁻⁴ takes a second per plot
    axes.yaxis.set_minor_formatter(lambda y, _: power(y) if high < 10 * low else "")
    axes.grid(True, alpha=0.25, linewidth=0.5)


def power(value: float) -> str:
    """Of a tick: "1e-04", "2.5e-04"."""
    short = f"{value:.0e}"
    return short if math.isclose(float(short), value, rel_tol=1e-6) else f"{value:.1e}"


def draw_histogram(axes, histogram: dict):
    """counts over powers of ten, edges [n + 1]."""
    edges = histogram["edges"]
    axes.bar(
        edges[:-1], histogram["counts"], width=edges[1] - edges[0], align="edge", color=COLOURS[0]
    )
    axes.set_yscale("symlog")
    axes.set_yticks([10**p for p in range(0, 9, 2) if 10**p <= 10 * max(histogram["counts"])])
    axes.xaxis.set_major_formatter(lambda x, _: f"1e{x:.0f}" if x == round(x) else "")
    axes.yaxis.set_major_formatter(lambda x, _: f"{x:,.0f}" if x < 1e6 else f"{x / 1e6:,.0f} M")
    axes.yaxis.set_minor_formatter(lambda x, _: "")
