"""Every worker takes a job from the command line, does it and prints one line of JSON. Standard library only.

A job has "task" ("build" or "run"), "variant", "checkpoint" and "work" (folders), "threads", "seed", and for a language
model "prompt" (tokens), "new" (tokens) and "batch". `build` makes what the variant needs, once; `run` gives
{"load_s", "first_s", "token_s": mean of the tokens after the first, "version", "settings"} or {"encode_s"}.
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
        figures = {}
    else:
        figures = run(job, folder)
    print("\n" + json.dumps(figures | {"peak_bytes": peak_bytes()}), flush=True)


def peak_bytes() -> int:
    """Peak memory of this process. (getrusage would include the process that it was forked from.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


def prompts(job, turn: int) -> list[list[int]]:
    """Random token ids, different in every turn: a repeated prompt might be found in a cache."""
    rng = random.Random(1000 * job["seed"] + turn)
    ids = []
    for _ in range(job["batch"]):
        ids.append([rng.randrange(1000, 59000) for _ in range(job["prompt"])])
    return ids


def median_time(encode, job) -> float:
    """Median seconds of `encode()` over job["repeats"] calls, after one that is not counted."""
    times = []
    for _ in range(1 + job["repeats"]):
        start = time.perf_counter()
        encode()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[job["repeats"] // 2]


def means(stamps: list[float], start: float) -> dict:
    """The times at which the tokens were ready -> figures in seconds."""
    return {"first_s": stamps[0] - start, "token_s": (stamps[-1] - stamps[0]) / (len(stamps) - 1)}
