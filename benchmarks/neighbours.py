"""Decoding beside other work: tokens per second with busy processes on the same processors, as a
share of those without.

    python benchmarks/neighbours.py [--loops 2] [--rounds 5] MODEL[:int8] ...

Each round decodes the same answer once alone and once beside `--loops` endless loops of the same
priority, so that whatever else this machine does is in both. Prints the median of each, of their
ratio, and the threads that decode. Exit code 1 when a ratio is below --at-least.
"""

import argparse
import statistics
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from runtime import Engine, SamplingParams  # first: it bounds the waiting of torch's threads

LOOP = [sys.executable, "-c", "while True: pass"]
SECONDS = 4  # of an answer, about


@contextmanager
def busy_loops(count: int):
    """`count` processes that compute without end, for as long as the block runs."""
    loops = [subprocess.Popen(LOOP) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def tokens_per_second(engine, prompt, tokens: int) -> float:
    """Of one greedy answer of so many tokens, without its prompt."""
    params = SamplingParams(
        max_tokens=tokens, temperature=0, repetition_penalty=1.0, ignore_eos=True
    )
    [result] = engine.generate([prompt], params)
    return (tokens - 1) / result.metrics["decode_seconds"]


def measured(spec: str, loops: int, rounds: int) -> dict:
    """Tokens per second of MODEL or MODEL:int8, alone and beside the loops, and threads."""
    import torch

    model, _, packed = spec.partition(":")
    engine = Engine(model, vision="torch", max_model_len=1024, cpu_weights=packed or "float")
    prompt = engine.prompt([{"role": "user", "content": "hello"}])
    speed = tokens_per_second(engine, prompt, 16)
    tokens = max(16, min(512, int(SECONDS * speed)))
    alone = []
    beside = []
    for _ in range(rounds):
        alone.append(tokens_per_second(engine, prompt, tokens))
        with busy_loops(loops):
            beside.append(tokens_per_second(engine, prompt, tokens))
    threads = torch.get_num_threads()
    engine.close()
    return {
        "alone": statistics.median(alone),
        "beside": statistics.median(beside),
        "ratio": statistics.median(b / a for a, b in zip(alone, beside)),
        "threads": threads,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL[:int8]")
    parser.add_argument("--loops", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-least", type=float, default=0.4)
    options = parser.parse_args()
    print(f"{'model':40} {'threads':>7} {'alone':>9} {'beside':>9} {'ratio':>6}  (tokens/s)")
    worst = 1.0
    for spec in options.models:
        row = measured(spec, options.loops, options.rounds)
        worst = min(worst, row["ratio"])
        print(
            f"{spec[-40:]:40} {row['threads']:7} {row['alone']:9.1f} {row['beside']:9.1f} "
            f"{row['ratio']:6.2f}",
            flush=True,
        )
    return int(worst < options.at_least)


if __name__ == "__main__":
    sys.exit(main())
