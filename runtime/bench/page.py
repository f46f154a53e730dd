"""What `runtime.bench` shows of its rows: a table on the terminal, a plot, and a page with both."""

import base64
from pathlib import Path

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


def averages(rows: list[dict]) -> list[list[str]]:
    """Per batch size over the grid: a row of cells under AVERAGES."""

    def mean(name, mine):
        values = [row[name] for row in mine if row[name] is not None]
        return f"{sum(values) / len(values):.2f}" if values else "-"

    groups = [
        [row for row in rows if row["batch"] == batch]
        for batch in sorted({row["batch"] for row in rows})
    ]
    return [
        [str(mine[0]["batch"]), str(len(mine)), *(mean(name, mine) for name in AVERAGES.values())]
        for mine in groups
    ]


def show(rows: list[dict]):
    from rich.console import Console
    from rich.table import Table

    table = Table("batch", "cases", *AVERAGES)
    for cells in averages(rows):
        table.add_row(*cells)
    Console().print(table)


def page(found: dict, picture: Path) -> str:
    """One self-contained page: what was measured where, averages, plot, every case."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(PAGE.read_text(encoding="utf-8"))
    image = base64.b64encode(picture.read_bytes()).decode("ascii")
    return template.render(
        found=found,
        image=image,
        titles=["batch", "cases", *AVERAGES],
        columns=COLUMNS,
        averages=averages(found["rows"]),
    )


def plot(rows: list[dict], path: Path):
    """First token over the prompt's length, and time per token over the whole length, per batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for batch in sorted({row["batch"] for row in rows}):
        mine = [row for row in rows if row["batch"] == batch]
        left.plot(
            [r["input"] for r in mine],
            [r["FirstTokenTime(ms)"] for r in mine],
            "o",
            label=f"batch {batch}",
        )
        several = [r for r in mine if r["TimePerTokens(ms)"] is not None]
        right.plot(
            [r["input"] + r["output"] for r in several],
            [r["TimePerTokens(ms)"] for r in several],
            "o",
            label=f"batch {batch}",
        )
    for axes, x, y in (
        (left, "prompt, tokens", "first token, ms"),
        (right, "prompt + answer, tokens", "per token, ms"),
    ):
        axes.set_xscale("log", base=2)  # lengths are mostly powers of two
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set(xlabel=x, ylabel=y, ylim=(0, None))
        axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
