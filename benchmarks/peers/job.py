"""What every worker does: take a job from the command line, do it, print one line of JSON. Standard library only.

A job has "task" ("build" or "run"), "variant", "checkpoint" and "work" (folders), "threads", "seed", and for a language
model "prompt" (tokens), "new" (tokens) and "batch". `build` makes what the variant needs, once; `run` gives
{"load_s", "first_s", "token_s": mean of the tokens behind the first, "version", "settings"} or {"encode_s"}.
"""

import json
import random
import sys
import time
from pathlib import Path

WARM_UP = 8  # tokens decoded after a prompt of full length, not counted


def main(build, run):
    """build(job, folder) fills an empty folder; run(job, folder) returns figures."""
    job = json.loads(sys.argv[1])
    folder = Path(job["work"]) / f"{Path(sys.argv[0]).stem.removeprefix('run_')}-{job['variant']}"
    if job["task"] == "build":
        if not folder.is_dir():
            part = folder.with_name(folder.name + ".part")
            part.mkdir(parents=True, exist_ok=True)
            build(job, part)
            part.rename(folder)
        found = {}
    else:
        found = run(job, folder)
    print("\n" + json.dumps(found | {"peak_bytes": peak_bytes()}), flush=True)


def peak_bytes() -> int:
    """Of this process alone: getrusage counts what it was before it became this program, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def prompts(job, turn: int) -> list[list[int]]:
    """Random token ids, others in every turn: a repeated prompt might be found in a cache."""
    dice = random.Random(1000 * job["seed"] + turn)
    return [
        [dice.randrange(1000, 59000) for _ in range(job["prompt"])] for _ in range(job["batch"])
    ]


def median_time(encode, job) -> float:
    """Median seconds of `encode()`; once before the clock starts."""
    times = []
    for _ in range(1 + job["repeats"]):
        start = time.perf_counter()
        encode()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[job["repeats"] // 2]


def means(stamps: list[float], start: float) -> dict:
    """Moments at which the tokens were there -> figures."""
    return {"first_s": stamps[0] - start, "token_s": (stamps[-1] - stamps[0]) / (len(stamps) - 1)}
