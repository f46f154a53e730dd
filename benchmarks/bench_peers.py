"""One random model in transformers, OpenVINO GenAI, llama.cpp, ONNX Runtime and here, on this CPU: medians and ratios.

    python benchmarks/bench_peers.py --model glm-edge-1.5b [--rounds 3] [--only ours,openvino] [--work FOLDER] [--fresh]

Every measurement is a process of its own that loads, warms up and is timed, on pinned threads; a round runs all
configurations one after another, with the memory bandwidth read in between. Each is kept in FOLDER/runs.jsonl as it
comes: a run that was stopped goes on, a configuration that fails is named with its reason and the others go on.
FOLDER/peers.md and peers.json hold the tables. --rounds 0 only makes environments and models.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from peers import environment, table  # noqa: E402
from peers.shapes import CASES, Entry, prepare, streamed_bytes  # noqa: E402

from runtime.common.errors import MISSING_COMPONENT, ToolkitError, run_command  # noqa: E402

WORKERS = ROOT / "benchmarks/peers"
TIMEOUT = 1800
REPEATS = 5
PROBE = ("512", "5")  # MiB, repeats
OPENMP = ("transformers", "llamacpp", "ours")  # the others pin their threads themselves


def main(argv: list[str]) -> int:
    options = parse(argv)
    case = CASES[options.model]
    work = (options.work or ROOT / "out/peers" / options.model).resolve()
    work.mkdir(parents=True, exist_ok=True)
    runs = Runs(work / "runs.jsonl", options.fresh)
    wanted = [e for e in case.entries if not options.only or {e.name, e.peer} & set(options.only)]
    told = (
        prepare(case, work)
        | {"threads": options.threads}
        | ({"repeats": REPEATS} if case.onnx else {"prompt": options.prompt, "new": options.new})
    )
    ready = [entry for entry in wanted if built(entry, told, runs)]
    probe = Probe(work, options.threads)
    for number in range(options.rounds):
        for entry in ready:
            if not runs.has(entry, number):
                runs.add(
                    measured(entry, told, number, probe, streamed_bytes(case, work, entry.variant))
                )
    report(options, case, runs.rows, work)
    return 0


def parse(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, choices=CASES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        help="peers or configurations, e.g. 'ours,llamacpp f16'",
    )
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--new", type=int, default=64, help="tokens")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument(
        "--work", type=Path, help="folder for models and results (default: out/peers/MODEL)"
    )
    parser.add_argument(
        "--fresh", action="store_true", help="forget the runs that were measured before"
    )
    return parser.parse_args(argv)


class Runs:
    """The measurements, one line each in a file."""

    def __init__(self, file: Path, fresh: bool):
        self.file = file
        if fresh:
            file.unlink(missing_ok=True)
        self.rows = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        )

    def add(self, row: dict):
        self.rows.append(row)
        with self.file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(f"{row['name']}: {row.get('error') or summary(row)}", file=sys.stderr)

    def has(self, entry, number: int) -> bool:
        return any(
            row["name"] == entry.name and row["round"] == number and "error" not in row
            for row in self.rows
        )


def summary(row: dict) -> str:
    return ", ".join(
        f"{key} {row[key]:.4g}"
        for key in ("first_s", "token_s", "encode_s", "bandwidth", "roofline", "others")
        if row.get(key) is not None
    )


def built(entry: Entry, told: dict, runs: Runs) -> bool:
    """The peer's environment and the variant's files are there; if not, the reason is in `runs`."""
    error = environment.ensure(entry.peer)
    if error is None:
        _, error = worker(entry, told | {"task": "build"})
    if error:
        runs.add({"name": entry.name, "round": -1, "batch": entry.batch, "error": error})
    return error is None


def worker(entry, job: dict) -> tuple[dict, str | None]:
    """Run a job in the peer's environment -> (figures, None) or ({}, what went wrong)."""
    job = {"seed": 0, **job, "variant": entry.variant, "batch": entry.batch, **dict(entry.extra)}
    command = [environment.python_of(entry.peer), WORKERS / f"run_{entry.peer}.py", json.dumps(job)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            cwd=job["work"],
            env=threaded(job["threads"], bind=entry.peer in OPENMP and "new" in job),
        )
    except subprocess.TimeoutExpired:
        return {}, f"took longer than {TIMEOUT} s"
    if done.returncode:
        return {}, f"failed (exit status {done.returncode}): {environment.last_line(done.stderr)}"
    said = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return (json.loads(said[-1]), None) if said else ({}, "printed no figures")


def threaded(threads: int, bind: bool) -> dict:
    """Environment with so many OpenMP threads, `bind`: each on a core of its own (which other thread pools of the process
    would inherit); nothing is looked up on a hub."""
    places = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"} if bind else {}
    return (
        os.environ
        | places
        | {
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
    )


def measured(entry, told, number: int, probe, weights: int | None) -> dict:
    before = probe.read()
    clock = Clock()
    found, error = worker(entry, told | {"task": "run", "seed": number})
    row = {
        "name": entry.name,
        "round": number,
        "batch": entry.batch,
        "when": time.strftime("%F %T"),
        **found,
    }
    if error:
        return row | {"error": error}
    row |= {"others": clock.others(), "bandwidth": (before + probe.read()) / 2}
    share = weights and entry.peer == "ours" and weights / row["bandwidth"] / row["token_s"]
    return row | {"roofline": share or None}


class Clock:
    """How busy the rest of the machine is while a child runs: share of all cores, 0 to 1."""

    def __init__(self):
        self.start, self.before = time.perf_counter(), self._busy()

    def others(self) -> float:
        wall = (time.perf_counter() - self.start) * os.cpu_count()
        machine, own = (b - a for a, b in zip(self.before, self._busy()))
        return max(0.0, machine - own) / wall

    def _busy(self) -> tuple[float, float]:
        fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (sum(fields[:3]) + sum(fields[5:7])) / os.sysconf(
            "SC_CLK_TCK"
        ), used.ru_utime + used.ru_stime


class Probe:
    """Read bandwidth of the memory in bytes/s; of plain and huge pages the faster."""

    def __init__(self, work: Path, threads: int):
        if shutil.which("gcc") is None:
            raise ToolkitError(
                "bandwidth is measured by a small C program; run: apt-get install gcc",
                MISSING_COMPONENT,
            )
        self.program = work / "bandwidth"
        self.threads = threads
        subprocess.run(
            [
                "gcc",
                "-O3",
                "-march=native",
                "-fopenmp",
                WORKERS / "bandwidth.c",
                "-o",
                self.program,
            ],
            check=True,
        )

    def read(self) -> float:
        said = subprocess.run(
            [self.program, *PROBE],
            capture_output=True,
            text=True,
            check=True,
            env=threaded(self.threads, bind=True),
        )
        return max(map(float, said.stdout.split())) * 1e9


def report(options, case, runs: list[dict], work: Path):
    rows = table.medians(runs)
    length = "one picture" if case.onnx else f"{options.prompt} tokens in, {options.new} out"
    found = {
        "model": options.model,
        "case": f"{length}, {options.threads} threads",
        "date": time.strftime("%F"),
        "machine": cpu(),
        "rows": rows,
        "targets": table.judged(case.targets, rows),
        "runs": runs,
        "missing": table.missing([entry.name for entry in case.entries], case.absent, runs, rows),
    }
    (work / "peers.json").write_text(json.dumps(found, indent=1) + "\n")
    page = table.markdown(found)
    (work / "peers.md").write_text(page)
    print(page)


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else 'unnamed CPU'}"


if __name__ == "__main__":
    sys.exit(run_command(main))
