"""What `runtime.bench` shows of its rows.

Takes the rows of a grid; prints a table of averages, writes a plot, returns a page with both.
Packages are imported when they are needed, after the peak memory has been read.
"""

import base64
import io
from pathlib import Path

from runtime.common.files import write_atomically

PAGE = Path(__file__).with_name("bench.html")
AVERAGES = {
    "first token ms": "FirstTokenTime(ms)",
    "per token ms": "TimePerTokens(ms)",
    "tokens/s each": "TokensPerSecond(ms)",
    "tokens/s together": "output_throughput",
    "picture process time ms": "vision_encode_ms",
}
COLUMNS = {
    "batch": "batch",
    "in": "input",
    "out": "output",
    "whole case ms": "ResponseTime(ms)",
    **AVERAGES,
    "p50 TTFT ms": "p50_ttft_ms",
    "p99 TTFT ms": "p99_ttft_ms",
    "p50 ITL ms": "p50_itl_ms",
    "p99 ITL ms": "p99_itl_ms",
}


def print_averages(rows: list[dict], left_out: list[dict]):
    """A table; below it the cases that were not measured, by name."""
    from rich.console import Console
    from rich.table import Table

    table = Table("batch", "cases", *AVERAGES)
    for cells in averages(rows):
        table.add_row(*cells)
    table.caption = "\n".join(left_out_lines(left_out))
    Console().print(table)


def left_out_lines(left_out: list[dict]) -> list[str]:
    """A line for each pair of lengths that is not measured, whatever the batch."""
    lines = {}
    for case in left_out:
        lines[f"left out: {case['input']} in, {case['output']} out ({case['reason']})"] = None
    return list(lines)


def render_page(found: dict, plot: Path) -> str:
    """One self-contained page: what was measured where, averages, plot, every case."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(PAGE.read_text(encoding="utf-8"))
    return template.render(
        found=found,
        image=base64.b64encode(plot.read_bytes()).decode("ascii"),
        titles=["batch", "cases", *AVERAGES],
        columns=COLUMNS,
        averages=averages(found["rows"]),
    )


def averages(rows: list[dict]) -> list[list[str]]:
    """Per batch size over the grid: its size, its number of cases, and cells under AVERAGES."""
    table = []
    for batch, cases in by_batch(rows).items():
        cells = [mean_of(name, cases) for name in AVERAGES.values()]
        table.append([str(batch), str(len(cases)), *cells])
    return table


def by_batch(rows: list[dict]) -> dict[int, list[dict]]:
    """The rows of each batch size, the smallest first."""
    groups = {}
    for row in sorted(rows, key=lambda row: row["batch"]):
        groups.setdefault(row["batch"], []).append(row)
    return groups


def mean_of(name: str, rows: list[dict]) -> str:
    values = [row[name] for row in rows if row[name] is not None]
    return f"{sum(values) / len(values):.2f}" if values else "-"


def write_plot(rows: list[dict], path: Path):
    """First token over the prompt's length, and time per token over the whole length, per batch
    size."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcdefaults()  # it has read a matplotlibrc of the current folder
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for batch, cases in by_batch(rows).items():
        label = f"batch {batch}"
        draw_points(left, label, cases, ("input",), "FirstTokenTime(ms)")
        draw_points(right, label, cases, ("input", "output"), "TimePerTokens(ms)")
    label_axes(left, "prompt, tokens", "first token, ms")
    label_axes(right, "prompt + answer, tokens", "per token, ms")
    figure.tight_layout()
    image = io.BytesIO()
    figure.savefig(image, dpi=120)
    write_atomically(path, image.getvalue())
    pyplot.close(figure)


def draw_points(axes, label: str, rows: list[dict], lengths: tuple[str, ...], figure: str):
    """One point per row that has the figure, over the sum of its lengths."""
    x = []
    y = []
    for row in rows:
        if row[figure] is not None:
            x.append(sum(row[name] for name in lengths))
            y.append(row[figure])
    axes.plot(x, y, "o", label=label)


def label_axes(axes, x: str, y: str):
    axes.set_xscale("log", base=2)  # lengths are mostly powers of two
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set(xlabel=x, ylabel=y, ylim=(0, None))
    axes.legend()
