"""Where a decoder's time goes on this CPU, and how near it is to what memory allows.

    python benchmarks/bench_decode.py --model DIR [--dtype bfloat16] [--cpu-weights float|int8|int4] [--batch 1,8]

Prints seconds to the first token of 512, ms per token (median and best of 63 steps), what of it is
spent outside the decoder, and the share of the read bandwidth that the weights of a step were read
with; bandwidth is measured on 1 GiB right before and after. Peak memory is that of loading, beside
what the plan said.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from runtime import Engine
from runtime.bench.workload import run, text_prompts
from runtime.engine.loading.cpu_weights import bits_per_value

PROMPT, ANSWER = 512, 64


def bandwidth() -> float:
    """GB/s of reading 1 GiB, the best of five."""
    import torch

    values = torch.ones(1 << 27, dtype=torch.int64)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - start)
    return values.nbytes / min(seconds) / 1e9


class Clock:
    """Seconds spent in the decoder: its layers and its head."""

    def __init__(self, decoder):
        self.seconds = 0.0
        decoder.forward, decoder.logits = self._timed(decoder.forward), self._timed(decoder.logits)

    def _timed(self, function):
        def timed(*arguments):
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                self.seconds += time.perf_counter() - start

        return timed


def step_bytes(engine, kind: str) -> float:
    """Weights that every step reads: all but the embedding."""
    from runtime.engine.loading.weights import decoder_rows

    return sum(
        np.prod(row.shape) * bits_per_value(str(part.target), kind, engine.plan.dtype) / 8
        for row in decoder_rows(engine.family, engine.split)
        for part in row.parts
        if part.target.role != "embed"
    )


def case(engine, clock, batch: int, rng) -> dict:
    prompts = text_prompts(engine, batch, PROMPT, rng)
    run(engine, prompts[:1], 4)  # warm
    prompts = text_prompts(engine, batch, PROMPT, rng)
    outside = []
    step = engine.step

    def timed():
        clock.seconds = 0.0
        start = time.perf_counter()
        events = step()
        outside.append(time.perf_counter() - start - clock.seconds)
        return events

    engine.step = timed
    lines = run(engine, prompts, ANSWER)
    engine.step = step
    steps = 1000 * np.diff(lines[0].tokens[1:])  # all sequences have their first token by then
    return {
        "first": max(line.tokens[0] for line in lines),
        "median": float(np.median(steps)),
        "best": float(steps.min()),
        "outside": 1000 * float(np.median(outside[-len(steps) :])),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--cpu-weights", default="float")
    parser.add_argument("--batch", default="1")
    options = parser.parse_args()
    batches = [int(b) for b in options.batch.split(",")]
    start = time.perf_counter()
    engine = Engine(
        options.model,
        dtype=options.dtype,
        cpu_weights=options.cpu_weights,
        max_num_seqs=max(batches),
        max_model_len=PROMPT + ANSWER,
    )
    print(
        f"loaded in {time.perf_counter() - start:.1f} s, peak memory {peak():.2f} GiB, planned "
        f"{(engine.plan.weights + engine.plan.cache) / 2**30:.2f}"
    )
    size = step_bytes(engine, options.cpu_weights) / 1e9
    rng = np.random.default_rng(0)
    before = bandwidth()
    clock = Clock(engine.decoder)
    for batch in batches:
        found = case(engine, clock, batch, rng)
        after = bandwidth()
        share = size / (found["median"] / 1000) / ((before + after) / 2)
        print(
            f"{options.cpu_weights} {options.dtype} batch {batch}: first token {found['first']:.2f} s, per token "
            f"{found['median']:.1f} ms (best {found['best']:.1f}), outside the decoder {found['outside']:.1f} ms, "
            f"{1000 * batch / found['median']:.1f} tokens/s, bandwidth {before:.0f}/{after:.0f} GB/s, share {share:.2f}",
            flush=True,
        )
        before = after


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
