"""Times one random model in transformers, OpenVINO GenAI, llama.cpp, ONNX Runtime and here, on this CPU.

    python benchmarks/bench_peers.py --model glm-edge-1.5b [--rounds 3] [--only ours,openvino] [--work FOLDER] [--fresh]

Every measurement is a process of its own that loads, warms up and is timed, on pinned threads; a round runs all
configurations one after another and measures the memory bandwidth in between. FOLDER/runs.jsonl keeps each measurement
as soon as it is made, so that a stopped run continues; a configuration that fails is reported with its reason and the
others go on. FOLDER/peers.md and peers.json hold the medians and ratios. --rounds 0 only makes environments and models.
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
    job = prepare(case, work) | {"threads": options.threads} | job_size(case, options)
    ready = [entry for entry in chosen(case, options) if make_ready(entry, job, runs)]
    probe = Probe(work, options.threads)
    for number in range(options.rounds):
        for entry in ready:
            if not runs.has(entry, number):
                weight_bytes = streamed_bytes(case, work, entry.variant)
                runs.add(measure(entry, job, number, probe, weight_bytes))
    write_report(options, case, runs.rows, work)
    return 0


def chosen(case, options) -> list[Entry]:
    """The configurations that --only names, by peer or by row name."""
    if not options.only:
        return list(case.entries)
    return [entry for entry in case.entries if {entry.name, entry.peer} & set(options.only)]


def job_size(case, options) -> dict:
    if case.onnx:
        return {"repeats": REPEATS}
    return {"prompt": options.prompt, "new": options.new}


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
    """The measurements (dicts) in `rows`, and one line each in `file`."""

    def __init__(self, file: Path, fresh: bool):
        self.file = file
        if fresh:
            file.unlink(missing_ok=True)
        self.rows = []
        if file.is_file():
            self.rows = [json.loads(line) for line in file.read_text().splitlines()]

    def add(self, row: dict):
        self.rows.append(row)
        with self.file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(f"{row['name']}: {row.get('error') or summary(row)}", file=sys.stderr)

    def has(self, entry, number: int) -> bool:
        """Whether round `number` of this configuration was measured without an error."""
        rows = [row for row in self.rows if row["name"] == entry.name and row["round"] == number]
        return any("error" not in row for row in rows)


def summary(row: dict) -> str:
    """The main figures of a measurement on one line."""
    keys = ("first_s", "token_s", "encode_s", "bandwidth", "roofline", "others")
    return ", ".join(f"{key} {row[key]:.4g}" for key in keys if row.get(key) is not None)


def make_ready(entry: Entry, job: dict, runs: Runs) -> bool:
    """Makes the peer's environment and the variant's files; if that fails, adds the reason to `runs`."""
    error = environment.install(entry.peer)
    if error is None:
        _, error = run_worker(entry, job | {"task": "build"})
    if error:
        runs.add({"name": entry.name, "round": -1, "batch": entry.batch, "error": error})
    return error is None


def run_worker(entry, job: dict) -> tuple[dict, str | None]:
    """Runs a job (see peers/job.py) in the peer's environment -> (figures, None) or ({}, reason of the failure)."""
    job = {"seed": 0, **job, "variant": entry.variant, "batch": entry.batch, **dict(entry.extra)}
    command = [environment.python_of(entry.peer), WORKERS / f"run_{entry.peer}.py", json.dumps(job)]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            cwd=job["work"],
            env=thread_environment(job["threads"], bind=entry.peer in OPENMP and "new" in job),
        )
    except subprocess.TimeoutExpired:
        return {}, f"took longer than {TIMEOUT} s"
    if done.returncode:
        return {}, f"failed (exit status {done.returncode}): {environment.error_line(done.stderr)}"
    objects = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not objects:
        return {}, "printed no figures"
    return json.loads(objects[-1]), None


def thread_environment(threads: int, bind: bool) -> dict:
    """The environment variables of a worker: number of OpenMP threads, no look-ups on a hub.

    bind: each thread stays on a core of its own (other thread pools of the process would inherit this).
    """
    variables = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if bind:
        variables |= {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    return os.environ | variables


def measure(entry, job, number: int, probe, weight_bytes: int | None) -> dict:
    """One measurement as a row: figures, mean bandwidth (bytes/s) before and after, share of the roofline."""
    before = probe.read()
    clock = Clock()
    figures, error = run_worker(entry, job | {"task": "run", "seed": number})
    row = {
        "name": entry.name,
        "round": number,
        "batch": entry.batch,
        "when": time.strftime("%F %T"),
        **figures,
    }
    if error:
        return row | {"error": error}
    row |= {"others": clock.others(), "bandwidth": (before + probe.read()) / 2, "roofline": None}
    if weight_bytes and entry.peer == "ours":
        row["roofline"] = weight_bytes / row["bandwidth"] / row["token_s"]
    return row


class Clock:
    """Measures how busy other processes keep the machine while a child runs, from construction to `others()`."""

    def __init__(self):
        self.start = time.perf_counter()
        self.machine = machine_seconds()
        self.children = children_seconds()

    def others(self) -> float:
        """Share of all cores, 0 to 1."""
        wall = (time.perf_counter() - self.start) * os.cpu_count()
        machine = machine_seconds() - self.machine
        children = children_seconds() - self.children
        return max(0.0, machine - children) / wall


def machine_seconds() -> float:
    """CPU seconds of all processes since the start of the machine: user, nice, system, irq and softirq."""
    first_line = Path("/proc/stat").read_text().split("\n", 1)[0]
    ticks = [int(field) for field in first_line.split()[1:]]
    return (sum(ticks[:3]) + sum(ticks[5:7])) / os.sysconf("SC_CLK_TCK")


def children_seconds() -> float:
    """CPU seconds of this process's finished children."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


class Probe:
    """Measures the memory's read bandwidth with plain and with huge pages; the faster counts."""

    def __init__(self, work: Path, threads: int):
        if shutil.which("gcc") is None:
            raise ToolkitError(
                "bandwidth is measured by a small C program; run: apt-get install gcc",
                MISSING_COMPONENT,
            )
        self.program = work / "bandwidth"
        self.threads = threads
        flags = ["-O3", "-march=native", "-fopenmp"]
        source = WORKERS / "bandwidth.c"
        subprocess.run(["gcc", *flags, source, "-o", self.program], check=True)

    def read(self) -> float:
        """Bytes per second."""
        done = subprocess.run(
            [self.program, *PROBE],
            capture_output=True,
            text=True,
            check=True,
            env=thread_environment(self.threads, bind=True),
        )
        return max(map(float, done.stdout.split())) * 1e9


def write_report(options, case, runs: list[dict], work: Path):
    """Writes peers.json and peers.md, and prints the page."""
    rows = table.medians(runs)
    length = "one picture" if case.onnx else f"{options.prompt} tokens in, {options.new} out"
    report = {
        "model": options.model,
        "case": f"{length}, {options.threads} threads",
        "date": time.strftime("%F"),
        "machine": cpu(),
        "rows": rows,
        "targets": table.judge(case.targets, rows),
        "runs": runs,
        "missing": table.missing([entry.name for entry in case.entries], case.absent, runs, rows),
    }
    (work / "peers.json").write_text(json.dumps(report, indent=1) + "\n")
    page = table.markdown(report)
    (work / "peers.md").write_text(page)
    print(page)


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} x {names[0] if names else 'unnamed CPU'}"


if __name__ == "__main__":
    sys.exit(run_command(main))
