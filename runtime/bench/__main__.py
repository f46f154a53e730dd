"""`python -m runtime.bench`: how fast a model is here.

A checkpoint and lengths flow in. The grid of the VisualGLM guide (default) flows out as one csv per batch size with the
guide's header, bench.json, bench.png and bench.html; --perf gives the `***Perf Info***` of the vllm_utils guides, --demo an
answer.
"""

import csv
import json
import platform
import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

from models.prompt.messages import content
from runtime.common.errors import INTERRUPTED, ToolkitError, run_command
from runtime.common.flags import Parser, flag, require
from runtime.engine.command import check_pictures, join_torchrun, open_engine
from runtime.engine.options import EngineOptions, InputOptions, SamplingParams

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
LENGTHS = "32,64,128,256,512,1024"
WARM_UP = 5  # tokens decoded before the clock starts


@dataclass(kw_only=True)
class BenchOptions(InputOptions):
    batch_size: str = flag(
        "sequences together, one or several numbers", "--batch", default="1", metavar="N,N,..."
    )
    input_len: str = flag("tokens of the prompts", default=LENGTHS, metavar="N,N,...")
    output_len: str = flag(
        "tokens of the answers", "--max-tokens", default=LENGTHS, metavar="N,N,..."
    )
    out: str = flag("folder that receives the tables", default=".", metavar="DIR")
    perf: bool = flag(
        "one case: print ***Perf Info*** and write it as csv", default=False, kind=bool
    )
    num_prompts: int = flag("--perf: requests", default=1, kind=int, metavar="N")
    demo: bool = flag(
        "print the answer to --prompt, about --image where given", default=False, kind=bool
    )
    prompt: str = flag("--demo: the question", default="Describe the picture.", metavar="TEXT")
    model_type: str | None = flag(
        "accepted and ignored: the checkpoint says what it is", default=None, metavar="NAME"
    )
    seed: int = flag("of the prompts' words", default=0, kind=int, metavar="N")

    def __post_init__(self):
        super().__post_init__()
        self.batches, self.inputs, self.outputs = (
            self._numbers(n) for n in ("batch_size", "input_len", "output_len")
        )
        require(self, "num_prompts", self.num_prompts >= 1, "1 or more is needed")
        if self.perf and max(map(len, (self.batches, self.inputs, self.outputs))) > 1:
            raise ToolkitError(
                "--perf measures one case: give one --batch-size, --input-len and --output-len"
            )

    def _numbers(self, name) -> list[int]:
        parts = str(getattr(self, name)).split(",")
        require(
            self,
            name,
            all(p.strip().isdigit() and int(p) for p in parts),
            "give numbers from 1 up, e.g. 1,2,4,8",
        )
        return [int(p) for p in parts]


def main(argv: list[str]) -> int:
    options, engine_options = Parser(
        "python -m runtime.bench",
        "--model DIR [--batch-size 1,2,4,8] [options]",
        "Times a model: a grid of batch sizes and lengths with prompts of random words (or, with --image, a question "
        "about a picture), decoded greedily to exactly the length asked for.",
        {"benchmark": BenchOptions, "model": EngineOptions},
    ).parse(argv)
    join_torchrun(engine_options)
    from models import family_of
    from runtime.common.files import prepare

    check_pictures(family_of(options.model), options.image)
    folder = prepare(options.out)
    engine = ready_engine(options, engine_options)
    if options.demo:
        demo(engine, options)
    elif options.perf:
        perf(engine, options, folder)
    else:
        return grid(engine, options, folder)
    return 0


def ready_engine(options: BenchOptions, engine_options: EngineOptions):
    together = max(options.batches)
    engine = open_engine(
        options.model,
        replace(engine_options, max_num_seqs=engine_options.max_num_seqs or together),
    )
    print("\n".join(engine.describe()), file=sys.stderr)
    return engine


def demo(engine, options):
    prompt = engine.prompt(
        [{"role": "user", "content": content(options.prompt, options.image)}], options.language
    )
    length = options.outputs[0] if len(options.outputs) == 1 else 128
    [result] = engine.generate([prompt], SamplingParams(max_tokens=length, temperature=0))
    print(f"Prompt: {prompt.text}, Generated text: {result.text}")


def perf(engine, options, folder: Path):
    """The guides' csv: every argument, then every figure, as Key,Value; named after the time. A json beside it has the
    figures as numbers, under vLLM's names."""
    from runtime.common.files import write_atomically

    from . import figures
    from . import workload as load

    words = Words(engine, options)
    output = options.outputs[0]
    load.run(engine, words.prompts(1, options.inputs[0]), 1)
    prompts = words.prompts(options.num_prompts, options.inputs[0])
    with token_progress(sum(len(prompt.ids) + output for prompt in prompts)) as (_, advance):
        lines = load.run(engine, prompts, output, advance)
    info = figures.perf_info(lines)
    print("\n***Perf Info***\n" + json.dumps(info, indent=4))
    rows = [("Key", "Value"), *((k, v) for k, v in asdict(options).items()), *info.items()]
    path = folder / f"{time.strftime('%Y%m%d%H%M%S')}.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    write_atomically(
        path.with_suffix(".json"),
        json.dumps(asdict(options) | figures.serving_figures(lines), indent=2) + "\n",
    )
    print(
        f"peak memory: {peak_bytes() / 2**30:.2f} GiB on the host\nwritten: {path} and .json",
        file=sys.stderr,
    )


def grid(engine, options, folder: Path) -> int:
    """Rows are written as they are measured, so that Ctrl-C keeps them. The exit code."""
    words = Words(engine, options)
    inputs = words.lengths(options.inputs)
    cases = [
        case
        for case in product(options.batches, inputs, options.outputs)
        if sum(case[1:]) <= engine.max_model_len
    ]
    if not cases:
        raise ToolkitError(
            f"no case fits: the shortest has {min(inputs) + min(options.outputs)} tokens, the limit "
            f"is {engine.max_model_len}; lower --input-len or --output-len"
        )
    rows = []
    try:
        for row in measured(engine, words, cases):
            rows.append(row)
            append_csv(
                folder / f"{row['batch']}_batch_performance_{engine.family.name}.csv",
                row,
                engine.max_model_len,
                fresh=sum(r["batch"] == row["batch"] for r in rows) == 1,
            )
    except KeyboardInterrupt:
        print(
            f"stopped after {len(rows)} of {len(cases)} cases; finished rows are kept",
            file=sys.stderr,
        )
    if rows:
        finish(engine, options, folder, rows, len(cases))
    return 0 if len(rows) == len(cases) else INTERRUPTED


def measured(engine, words, cases):
    """Yields a row per case."""
    from . import figures
    from . import workload as load

    load.run(engine, words.prompts(1, cases[0][1]), WARM_UP)
    with token_progress(sum(b * (i + o) for b, i, o in cases)) as (title, advance):
        for batch, inputs, outputs in cases:
            title(f"batch {batch}, {inputs} in, {outputs} out")
            lines = load.run(engine, words.prompts(batch, inputs), outputs, advance)
            yield {
                "batch": batch,
                "input": lines[0].input_tokens,
                "output": outputs,
                **figures.case_figures(lines),
                **figures.serving_figures(lines),
            }


@contextmanager
def token_progress(total: int):
    """Yields title(text) and advance(tokens): a bar with the time left, in tokens because cases differ a hundredfold."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total)
        yield (
            (lambda text: bar.update(task, description=text)),
            (lambda tokens: bar.advance(task, tokens)),
        )


class Words:
    """Where the prompts come from: shuffled text of an exact length, or a picture."""

    def __init__(self, engine, options):
        import numpy as np

        self.engine = engine
        self.pictures = options.image
        self.rng = np.random.default_rng(options.seed)

    def prompts(self, count: int, length: int) -> list:
        from . import workload as load

        if self.pictures:
            return load.picture_prompts(self.engine, self.pictures, count, self.rng)
        return load.text_prompts(self.engine, count, length, self.rng)

    def lengths(self, asked: list[int]) -> list[int]:
        """Of the prompts: a question about a picture has one, whatever was asked for."""
        return [len(self.prompts(1, 0)[0].ids)] if self.pictures else asked


def append_csv(path: Path, row: dict, longest: int, fresh: bool):
    figures = ["" if row[name] is None else f"{row[name]:.2f}" for name in HEADER[4:]]
    values = [row["batch"], longest, row["input"], row["output"], *figures]
    with path.open("w" if fresh else "a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(([HEADER] if fresh else []) + [values])


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def finish(engine, options, folder: Path, rows: list[dict], cases: int):
    from runtime.common.files import write_atomically

    from .page import page, plot, show

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
    plot(rows, folder / "bench.png")
    write_atomically(folder / "bench.html", page(found, folder / "bench.png"))
    show(rows)
    print(
        f"peak memory: {found['peak_host_bytes'] / 2**30:.2f} GiB on the host\nwritten: {folder / 'bench.json'}, bench.png, "
        f"bench.html, *_batch_performance_{engine.family.name}.csv",
        file=sys.stderr,
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
