"""Decoding beside other work: tokens per second with busy processes on the same processors, as a
share of those without.

    python benchmarks/neighbours.py [--loops 2] [--rounds 5] [--against COMMIT] MODEL[:int8] ...

Each round decodes the same answer alone, with the sources of --against alone, and beside `--loops`
endless loops of the same priority and session (Linux divides the processors among sessions first).
Prints the medians, the median of the rounds' ratios, and how much of the processors was taken by
other work while this ran alone: with more than a twentieth the machine was not idle, and nothing is
judged.

Exit code 1 when a ratio is below --at-least, or the speed alone below --unchanged of the commit's;
3 when the machine was not idle.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORKER = Path(__file__).with_name("decode_worker.py")
LOOP = [sys.executable, "-c", "while True: pass"]
SECONDS = 4  # of an answer, about
IDLE = 0.05  # of the processors: what others may take of an idle machine
FAILED, NOT_IDLE = 1, 3


class Worker:
    """A process that decodes with the sources in `tree`."""

    def __init__(self, tree: Path, spec: str):
        command = [sys.executable, str(WORKER), str(tree), spec]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.threads = self._read()["threads"]

    def decode(self, tokens: int) -> dict:
        """The worker's line, and `others`: share of all processors that other work took."""
        start = time.monotonic()
        before = busy_seconds()
        print(tokens, file=self.process.stdin, flush=True)
        found = self._read()
        taken = busy_seconds() - before - found["cpu_seconds"]
        elapsed = time.monotonic() - start
        found["others"] = max(0.0, taken / elapsed / os.cpu_count())
        return found

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{' '.join(self.process.args)} ended, see above")
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def busy_seconds() -> float:
    """Processor time that was used or withheld on this machine since it started."""
    fields = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]
    user, nice, system, _, _, irq, softirq, steal = (int(field) for field in fields[:8])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


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


@contextmanager
def sources_of(commit: str):
    """A folder with the sources of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(
            ["git", "archive", commit], cwd=ROOT, check=True, stdout=subprocess.PIPE
        )
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield Path(folder)


def measured(spec: str, tree: Path | None, loops: int, rounds: int) -> dict:
    """Per quantity the values of all rounds: alone, beside and then (the other tree) in tokens per
    second, others; and the threads."""
    worker = Worker(ROOT, spec)
    former = tree and Worker(tree, spec)
    tokens = max(16, min(960, int(SECONDS * worker.decode(16)["tokens_per_second"])))
    found = {"alone": [], "then": [], "beside": [], "others": []}
    for _ in range(rounds):
        alone = worker.decode(tokens)
        found["alone"].append(alone["tokens_per_second"])
        found["others"].append(alone["others"])
        if former:
            found["then"].append(former.decode(tokens)["tokens_per_second"])
        with busy_loops(loops):
            found["beside"].append(worker.decode(tokens)["tokens_per_second"])
    for each in filter(None, (worker, former)):
        each.close()
    return {**found, "threads": worker.threads}


def median_ratio(values: list[float], others: list[float]) -> float | None:
    """Of each round's two values; None without any."""
    ratios = [value / other for value, other in zip(values, others)]
    return statistics.median(ratios) if ratios else None


def print_row(spec: str, found: dict):
    cells = [f"{spec[-40:]:40} {found['threads']:7}"]
    cells += [f"{statistics.median(found[name]):9.1f}" for name in ("alone", "beside")]
    cells.append(f"{found['ratio']:6.2f}")
    if found["then"]:
        cells.append(f"{statistics.median(found['then']):9.1f} {found['unchanged']:6.2f}")
    cells.append(f"{statistics.median(found['others']):7.0%}")
    print(" ".join(cells), flush=True)


def judge(found: dict, options) -> int:
    """The row's exit code, with a sentence for what is wrong."""
    others = statistics.median(found["others"])
    if others > IDLE:
        print(
            f"  not judged: other work took {others:.0%} of the processors while this was to run "
            "alone; end it and run this again"
        )
        return NOT_IDLE
    if found["ratio"] < options.at_least:
        print(f"  too slow beside other work: {found['ratio']:.2f} is below {options.at_least}")
        return FAILED
    if found["then"] and found["unchanged"] < options.unchanged:
        print(
            f"  slower than {options.against}: {found['unchanged']:.2f} is below {options.unchanged}"
        )
        return FAILED
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL[:int8]")
    parser.add_argument("--loops", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--at-least", type=float, default=0.4)
    parser.add_argument("--against", metavar="COMMIT", help="compare the speed alone with it")
    parser.add_argument("--unchanged", type=float, default=0.95)
    options = parser.parse_args()
    print(f"load average of the last minute: {os.getloadavg()[0]:.2f}, {os.cpu_count()} processors")
    former = f"{options.against:>9} {'now/it':>6} " if options.against else ""
    print(f"{'tokens/s':40} {'threads':>7} {'alone':>9} {'beside':>9} {'ratio':>6} {former} others")
    codes = []
    with ExitStack() as stack:
        tree = stack.enter_context(sources_of(options.against)) if options.against else None
        for spec in options.models:
            found = measured(spec, tree, options.loops, options.rounds)
            found["ratio"] = median_ratio(found["beside"], found["alone"])
            found["unchanged"] = median_ratio(found["alone"], found["then"])
            print_row(spec, found)
            codes.append(judge(found, options))
    return FAILED if FAILED in codes else max(codes)


if __name__ == "__main__":
    sys.exit(main())
