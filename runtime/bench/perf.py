"""`--perf`: one case, as the vllm_utils guides measure it.

Takes an engine and options, prints `***Perf Info***`, and writes a csv and a json.
"""

import csv
import json
import time
from dataclasses import asdict
from pathlib import Path

from runtime.common.files import write_atomically
from runtime.common.progress import print_status, token_progress

from . import workload
from .figures import peak_bytes, perf_info, serving_figures
from .options import BenchOptions


def measure_case(engine, options: BenchOptions, folder: Path):
    """Writes the guides' csv, named after the time: every argument, then every figure, as
    Key,Value. A json beside it has the figures as numbers, under vLLM's names."""
    timelines = time_case(engine, options)
    info = perf_info(timelines)
    print("\n***Perf Info***\n" + json.dumps(info, indent=4))
    path = folder / f"{time.strftime('%Y%m%d%H%M%S')}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = [("Key", "Value"), *asdict(options).items(), *info.items()]
        csv.writer(file).writerows(rows)
    figures = asdict(options) | serving_figures(timelines)
    write_atomically(path.with_suffix(".json"), json.dumps(figures, indent=2) + "\n")
    print_status(
        f"peak memory: {peak_bytes() / 2**30:.2f} GiB on the host\nwritten: {path} and .json"
    )


def time_case(engine, options: BenchOptions) -> list[workload.Timeline]:
    """One token to warm up, then the case."""
    source = workload.PromptSource(engine, options.image, options.seed)
    [input_length] = options.inputs
    [output_length] = options.outputs
    workload.run(engine, source.prompts(1, input_length), 1)
    prompts = source.prompts(options.num_prompts, input_length)
    tokens = sum(len(prompt.ids) + output_length for prompt in prompts)
    with token_progress(tokens) as (_, advance):
        return workload.run(engine, prompts, output_length, advance)
