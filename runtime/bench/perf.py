"""`--perf`: one case, as the vllm_utils guides measure it.

Takes an engine and options, prints `***Perf Info***`, and writes a csv and a json.
"""

import csv
import json
import time
from pathlib import Path

from models.files import named
from runtime.common.files import new_text, write_atomically
from runtime.common.progress import print_status, token_progress

from . import workload
from .figures import perf_info, serving_figures
from .options import BenchOptions
from .record import describe_peaks, peak_memory, used_arguments


def measure_case(engine, options: BenchOptions, folder: Path):
    """Writes the guides' csv, named after the time: every argument, then every figure, as
    Key,Value. A json beside it has the figures as numbers, under vLLM's names."""
    timelines = time_case(engine, options)
    info = perf_info(timelines)
    print("\n***Perf Info***\n" + json.dumps(info, indent=4))
    arguments = used_arguments(engine, options)
    arguments["input_len"] = timelines[0].input_tokens
    peaks = peak_memory(engine)
    path = folder / f"{time.strftime('%Y%m%d%H%M%S')}.csv"
    with named(path), new_text(path) as file:
        rows = [("Key", "Value"), *arguments.items(), *info.items(), *peaks.items()]
        csv.writer(file).writerows(rows)
    figures = arguments | serving_figures(timelines) | peaks
    write_atomically(path.with_suffix(".json"), json.dumps(figures, indent=2) + "\n")
    print_status(f"{describe_peaks(peaks)}\nwritten: {path} and .json")


def time_case(engine, options: BenchOptions) -> list[workload.Timeline]:
    """One token to warm up, then the case."""
    source = workload.PromptSource(engine, options.pictures, options.seed)
    input_length = options.inputs[0]  # a question about a picture has its own
    [output_length] = options.outputs
    workload.run(engine, source.prompts(1, input_length), 1)
    prompts = source.prompts(options.num_prompts, input_length)
    tokens = sum(len(prompt.ids) + output_length for prompt in prompts)
    with token_progress(tokens) as (_, advance):
        return workload.run(engine, prompts, output_length, advance)
