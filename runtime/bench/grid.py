"""The grid of the VisualGLM guide: every batch size with every input and output length.

Takes an engine and options; writes one csv per batch size, bench.json, bench.png and bench.html.
"""

import csv
import json
import platform
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from models.files import named
from runtime.common.errors import INTERRUPTED, ToolkitError
from runtime.common.files import appended_text, new_text, write_atomically
from runtime.common.progress import print_status, token_progress

from . import workload
from .figures import case_figures, serving_figures
from .options import BenchOptions
from .page import left_out_lines, print_averages, render_page, write_plot
from .record import describe_peaks, peak_memory, used_arguments

HEADER = (
    "Batch",
    "MaxSeqLen",
    "InputSeqLen(Encoding)",
    "OutputSeqLen(Decoding)",
    "ResponseTime(ms)",
    "FirstTokenTime(ms)",
    "TimePerTokens(ms)",
    "TokensPerSecond(ms)",
    "PictureProcessTime(ms)",
)
WARM_UP = 5  # tokens decoded before the clock starts


@dataclass
class Grid:
    """What is measured: (batch size, input length, output length) of each case that fits, and
    {"batch", "input", "output", "reason"} of each that does not."""

    cases: list[tuple[int, int, int]]
    left_out: list[dict]

    @property
    def size(self) -> int:
        return len(self.cases) + len(self.left_out)


def measure_grid(engine, options: BenchOptions, folder: Path) -> int:
    """Rows are written as they are measured, so that Ctrl-C keeps them. Returns the exit code."""
    source = workload.PromptSource(engine, options.pictures, options.seed)
    grid = choose_cases(engine, options, source)
    for text in left_out_lines(grid.left_out):
        print_status(text)
    cases = grid.cases
    rows = []
    begun = set()
    try:
        for row in measure_cases(engine, source, cases):
            rows.append(row)
            path = folder / csv_name(row["batch"], engine)
            append_csv(path, row, engine.max_model_len, fresh=path not in begun)
            begun.add(path)
    except KeyboardInterrupt:
        print_status(f"stopped after {len(rows)} of {len(cases)} cases; finished rows are kept")
    if rows:
        write_report(engine, options, folder, rows, grid)
    return 0 if len(rows) == len(cases) else INTERRUPTED


def choose_cases(engine, options: BenchOptions, source) -> Grid:
    """The cases within the model's length limit, and those that are not. ToolkitError if none
    is."""
    inputs = source.lengths(options.inputs)
    grid = Grid([], [])
    limit = engine.max_model_len
    shortest = source.shortest()
    for case in product(options.batches, inputs, options.outputs):
        batch, read, answer = case
        reason = None
        if read < shortest:
            reason = f"the prompt's frame and a word take {shortest} tokens"
        elif read + answer > limit:
            reason = f"{read + answer} tokens, the limit is {limit}"
        if reason is None:
            grid.cases.append(case)
        else:
            grid.left_out.append(
                {"batch": batch, "input": read, "output": answer, "reason": reason}
            )
    if not grid.cases:
        raise ToolkitError(
            f"no case fits: {grid.left_out[0]['reason']}; give an --input-len from {shortest} up "
            f"whose sum with --output-len is at most {limit}"
        )
    return grid


def measure_cases(engine, source, cases: list[tuple[int, int, int]]):
    """Yields a row per case."""
    workload.run(engine, source.prompts(1, cases[0][1]), WARM_UP)
    total = sum(batch * (inputs + outputs) for batch, inputs, outputs in cases)
    with token_progress(total) as (set_title, advance):
        for batch, inputs, outputs in cases:
            set_title(f"batch {batch}, {inputs} in, {outputs} out")
            prompts = source.prompts(batch, inputs)
            timelines = workload.run(engine, prompts, outputs, advance)
            yield {
                "batch": batch,
                "input": timelines[0].input_tokens,
                "output": outputs,
                **case_figures(timelines),
                **serving_figures(timelines),
            }


def csv_name(batch: int | str, engine) -> str:
    return f"{batch}_batch_performance_{engine.family.name}.csv"


def append_csv(path: Path, row: dict, max_model_len: int, fresh: bool):
    """Add a row of the guide's table and the picture's time; `fresh` begins the file anew, with its
    header."""
    figures = ["" if row[name] is None else f"{row[name]:.2f}" for name in HEADER[4:]]
    values = [row["batch"], max_model_len, row["input"], row["output"], *figures]
    with named(path), new_text(path) if fresh else appended_text(path) as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(HEADER)
        writer.writerow(values)


def write_report(engine, options: BenchOptions, folder: Path, rows: list[dict], grid: Grid):
    """bench.json, bench.png and bench.html; the averages also on the terminal."""
    found = {
        "model": options.model,
        "family": engine.family.name,
        "arguments": used_arguments(engine, options),
        "lines": engine.describe(),
        "memory": engine.plan.describe(),
        **peak_memory(engine),
        "machine": platform.platform(),
        "date": time.strftime("%F %T"),
        "warm_up": f"{WARM_UP} tokens, not counted",
        "cases": grid.size,
        "finished": len(rows),
        "left_out": grid.left_out,
        "rows": rows,
    }
    write_atomically(folder / "bench.json", json.dumps(found, indent=2) + "\n")
    write_plot(rows, folder / "bench.png")
    write_atomically(folder / "bench.html", render_page(found, folder / "bench.png"))
    print_averages(rows, grid.left_out)
    print_status(
        f"{describe_peaks(found)}\n"
        f"written: {folder / 'bench.json'}, bench.png, bench.html, {csv_name('*', engine)}"
    )
