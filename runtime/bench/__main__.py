"""`python -m runtime.bench`: how fast a model is here.

Takes a checkpoint and lengths. Writes the grid of the VisualGLM guide (default): one csv per batch
size with the guide's header, bench.json, bench.png and bench.html. With --perf it prints and writes
the `***Perf Info***` of the vllm_utils guides, with --demo it prints an answer.
"""

import sys
from dataclasses import replace
from pathlib import Path

from models import family_of
from models.prompt.messages import content
from models.terminal import for_stdout
from runtime.common.errors import run_command
from runtime.common.files import prepare
from runtime.common.flags import Parser
from runtime.common.progress import print_status
from runtime.engine.command import check_images, join_torchrun, open_engine
from runtime.engine.options import EngineOptions, SamplingParams

from .options import BenchOptions

DEMO_TOKENS = 128  # of an answer, where --output-len names several lengths


def main(argv: list[str]) -> int:
    options, engine_options = Parser(
        "python -m runtime.bench",
        "--model DIR [--batch-size 1,2,4,8] [options]",
        "Times a model: a grid of batch sizes and lengths with prompts of random words (or, with "
        "--image, a question about a picture), decoded greedily to exactly the length asked for.",
        {"benchmark": BenchOptions, "model": EngineOptions},
    ).parse(argv)
    join_torchrun(engine_options)
    check_images(family_of(options.model), options.pictures)
    folder = prepare(options.out)
    return measure(ready_engine(options, engine_options), options, folder)


def ready_engine(options: BenchOptions, engine_options: EngineOptions):
    """The engine, with room for the largest batch unless --max-num-seqs says otherwise."""
    max_num_seqs = engine_options.max_num_seqs or max(options.batches)
    engine = open_engine(options.model, replace(engine_options, max_num_seqs=max_num_seqs))
    print_status("\n".join(engine.describe()))
    return engine


def measure(engine, options: BenchOptions, folder: Path) -> int:
    """What the options ask for. Returns the exit code."""
    if options.demo:
        print_demo(engine, options)
    if options.perf:
        from .perf import measure_case

        measure_case(engine, options, folder)
    if options.demo or options.perf:
        return 0
    from .grid import measure_grid

    return measure_grid(engine, options, folder)


def print_demo(engine, options: BenchOptions):
    message = {"role": "user", "content": content(options.question, options.pictures)}
    prompt = engine.prompt([message], options.language)
    length = options.outputs[0] if len(options.outputs) == 1 else DEMO_TOKENS
    [result] = engine.generate([prompt], SamplingParams(max_tokens=length, temperature=0))
    print(for_stdout(f"Prompt: {prompt.text}, Generated text: {result.text}"))
    if options.pictures:
        print_status(f"picture process time: {result.metrics['vision_seconds']:.3f} s")


if __name__ == "__main__":
    sys.exit(run_command(main))
