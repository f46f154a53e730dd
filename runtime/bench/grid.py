"""The grid of the VisualGLM guide: every batch size with every input and output length.

Takes an engine and options; writes one csv per batch size, bench.json, bench.png and bench.html.
"""

import csv
import json
import platform
import time
from itertools import product
from pathlib import Path

from runtime.common.errors import INTERRUPTED, ToolkitError
from runtime.common.files import write_atomically
from runtime.common.progress import print_status, token_progress

from . import workload
from .figures import case_figures, peak_bytes, serving_figures
from .options import BenchOptions
from .page import print_averages, render_page, write_plot

HEADER = (
    "Batch",
    "MaxSeqLen",
    "InputSeqLen(Encoding)",
    "OutputSeqLen(Decoding)",
    "ResponseTime(ms)",
    "FirstTokenTime(ms)",
    "TimePerTokens(ms)",
    "TokensPerSecond(ms)",
)
WARM_UP = 5  # tokens decoded before the clock starts


def measure_grid(engine, options: BenchOptions, folder: Path) -> int:
    """Rows are written as they are measured, so that Ctrl-C keeps them. Returns the exit code."""
    source = workload.PromptSource(engine, options.image, options.seed)
    cases = fitting_cases(engine, options, source)
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
        write_report(engine, options, folder, rows, len(cases))
    return 0 if len(rows) == len(cases) else INTERRUPTED


def fitting_cases(engine, options: BenchOptions, source) -> list[tuple[int, int, int]]:
    """(batch size, input length, output length) of every case within the model's length limit."""
    inputs = source.lengths(options.inputs)
    cases = []
    for batch, input_length, output_length in product(options.batches, inputs, options.outputs):
        if input_length + output_length <= engine.max_model_len:
            cases.append((batch, input_length, output_length))
    if not cases:
        shortest = min(inputs) + min(options.outputs)
        raise ToolkitError(
            f"no case fits: the shortest has {shortest} tokens, the limit is "
            f"{engine.max_model_len}; lower --input-len or --output-len"
        )
    return cases


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
    """Add a row of the guide's table; `fresh` begins the file anew, with its header."""
    figures = ["" if row[name] is None else f"{row[name]:.2f}" for name in HEADER[4:]]
    values = [row["batch"], max_model_len, row["input"], row["output"], *figures]
    with path.open("w" if fresh else "a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if fresh:
            writer.writerow(HEADER)
        writer.writerow(values)


def write_report(engine, options: BenchOptions, folder: Path, rows: list[dict], cases: int):
    """bench.json, bench.png and bench.html; the averages also on the terminal."""
    found = {
        "model": options.model,
        "family": engine.family.name,
        "lines": engine.describe(),
        "memory": engine.plan.describe(),
        "peak_host_bytes": peak_bytes(),
        "machine": platform.platform(),
        "date": time.strftime("%F %T"),
        "warm_up": f"{WARM_UP} tokens, not counted",
        "cases": cases,
        "finished": len(rows),
        "rows": rows,
    }
    write_atomically(folder / "bench.json", json.dumps(found, indent=2) + "\n")
    write_plot(rows, folder / "bench.png")
    write_atomically(folder / "bench.html", render_page(found, folder / "bench.png"))
    print_averages(rows)
    print_status(
        f"peak memory: {found['peak_host_bytes'] / 2**30:.2f} GiB on the host\n"
        f"written: {folder / 'bench.json'}, bench.png, bench.html, {csv_name('*', engine)}"
    )
