"""A comparison on the terminal.

Takes the findings, prints a table of the stages and the verdict.
"""

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .formats import cosine, number, percent

COLUMNS = ("stage", "rows", "cosine min", "max abs", "mean abs", "KL max", "top-1")


def show(found: dict, out: Path):
    """Summary table on stdout; the last two lines are the report's path and its verdict."""
    console = Console()
    console.print(_table(found["stages"]))
    if found["dataset"]:
        console.print(_dataset_line(found["dataset"]), highlight=False)
    if found["culprit"]:
        _print_line(console, f"search: {found['culprit']['sentence']}")
    _print_line(console, _picture_line(found))
    _print_line(console, f"report: {out / 'report.html'}")
    colour = "green" if found["passed"] else "red"
    _print_line(console, found["verdict"], f"bold {colour}")


def _picture_line(found: dict) -> str:
    sides = ("reference", "candidate")
    times = [f"{side} {found[side]['picture_process_time']:.3f} s" for side in sides]
    return f"picture process time: {', '.join(times)}"


def _print_line(console: Console, text: str, style: str = ""):
    """As it is, for a copy: not wrapped."""
    console.print(text, soft_wrap=True, markup=False, highlight=False, style=style)


def _table(stages: dict[str, dict]) -> Table:
    table = Table(*COLUMNS, box=SIMPLE_HEAD)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, stage in stages.items():
        table.add_row(name, *_cells(stage))
    return table


def _cells(stage: dict) -> list[str]:
    if not stage["rows"]:
        return ["0", "not compared"]
    cells = [str(stage["rows"]), cosine(stage["cosine_min"])]
    cells += [number(stage["max_abs"]), number(stage["mean_abs"])]
    if "kl_max" in stage:
        cells += [number(stage["kl_max"]), percent(stage["top1_agreement"])]
    return cells


def _dataset_line(dataset: dict) -> str:
    reference = percent(dataset["reference"])
    candidate = percent(dataset["candidate"])
    return (
        f"dataset: {dataset['questions']} questions, right: reference {reference}, "
        f"candidate {candidate}; same answer: {percent(dataset['same'])}"
    )
