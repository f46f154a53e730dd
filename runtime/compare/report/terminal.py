"""A comparison as tables on the terminal."""

from pathlib import Path

from .formats import cosine, number, percent


def show(found: dict, out: Path):
    """Summary table on stdout; the last two lines are the report's path and its verdict."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(
        "stage", "rows", "cosine min", "max abs", "mean abs", "KL max", "top-1", box=SIMPLE_HEAD
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, stage in found["stages"].items():
        table.add_row(name, *stage_cells(stage))
    console.print(table)
    if found["dataset"]:
        d = found["dataset"]
        console.print(
            f"dataset: {d['questions']} questions, right: reference {percent(d['reference'])}, candidate "
            f"{percent(d['candidate'])}; same answer: {percent(d['same'])}",
            highlight=False,
        )
    if found["culprit"]:
        console.print(
            f"search: {found['culprit']['sentence']}", soft_wrap=True, markup=False, highlight=False
        )
    for line in (f"report: {out / 'report.html'}", found["verdict"]):
        console.print(
            line,
            soft_wrap=True,
            markup=False,
            highlight=False,
            style=""
            if line.startswith("report")
            else "bold green"
            if found["passed"]
            else "bold red",
        )


def stage_cells(stage: dict) -> list[str]:
    if not stage["rows"]:
        return ["0", "not compared"]
    cells = [
        str(stage["rows"]),
        cosine(stage["cosine_min"]),
        number(stage["max_abs"]),
        number(stage["mean_abs"]),
    ]
    return cells + (
        [number(stage["kl_max"]), percent(stage["top1_agreement"])] if "kl_max" in stage else []
    )
