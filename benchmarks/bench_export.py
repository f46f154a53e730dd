"""Measures time and peak memory of the vision export, beside a plain torch.onnx.export with the weights in memory.

`python benchmarks/bench_export.py --model DIR --out DIR`: every row of the table is a process of its own, timed from
its start, so each imports only what it uses. The files written are removed again. `--skip-plain` leaves out the second
row, which needs memory for the whole tower.
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


def export_streamed(model: str, out: Path):
    """Exports as `python -m convert` does: identify the checkpoint (hash its vision bytes), trace, stream, check."""
    from convert.export.trace import OPSET
    from convert.pipeline import export_encoder
    from convert.verify.preflight import preflight
    from models import family_of
    from models.checkpoint import Checkpoint
    from runtime.vision.artifact import ONNX
    from runtime.vision.source import Source

    family = family_of(model)
    checkpoint = Checkpoint(model)
    checkpoint.check(family.weights())
    export_encoder(Source(family, checkpoint), out / "files")
    findings, _ = preflight(out / "files" / ONNX, family.vision, OPSET)
    assert not findings, findings


def export_plain(model: str, out: Path):
    """Loads the same tower and exports it with torch.onnx.export and external data."""
    import torch

    from models import family_of
    from models.checkpoint import Checkpoint
    from runtime.vision.torch_session import plain_tower

    family = family_of(model)
    tower = plain_tower(family, Checkpoint(model), torch.float32)
    pixels = torch.zeros(family.vision.input_shape)
    path = out / "files" / "vision.onnx"
    path.parent.mkdir()
    torch.onnx.export(tower, (pixels,), path, dynamo=True, opset_version=18, external_data=True)


def measure(step: str, model: str, out: Path) -> dict:
    """Runs a step in a child with caches of its own -> {seconds, cpu (s), peak (bytes), written (bytes)}."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "ASCEND_VLM_CACHE": str(out / "cache")}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, __file__, "--model", model, "--out", out, "--step", step],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{step} failed:\n{done.stderr}")
    result = json.loads(done.stdout.splitlines()[-1])
    result["seconds"] = time.perf_counter() - start
    result["written"] = sum(file.stat().st_size for file in out.glob("files/vision.onnx*"))
    shutil.rmtree(out)
    return result


STEPS = {"streamed": export_streamed, "plain": export_plain}


def run_step(step: str, model: str, out: Path):
    """Runs in the child: does the step and prints its CPU seconds and peak memory as JSON."""
    STEPS[step](model, out)
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"cpu": used.ru_utime + used.ru_stime, "peak": used.ru_maxrss * 1024}))


def print_table(rows: dict[str, dict]):
    from rich.console import Console
    from rich.table import Table

    table = Table(
        "export", "wall s", "CPU s", "peak RSS GB", "written GB", title="vision encoder export"
    )
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['seconds']:.1f}",
            f"{row['cpu']:.1f}",
            f"{row['peak'] / 1e9:.2f}",
            f"{row['written'] / 1e9:.2f}",
        )
    if len(rows) == 2:
        ours, theirs = rows.values()
        ratios = [f"{theirs[key] / ours[key]:.1f}x" for key in ("seconds", "cpu", "peak")]
        table.add_row("plain / streamed", *ratios, "")
    Console().print(table)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help="checkpoint folder, real or written by models.synthetic"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "out/bench-export",
        help="scratch folder, made and removed (default: out/bench-export)",
    )
    parser.add_argument(
        "--skip-plain", action="store_true", help="measure only the streamed export"
    )
    parser.add_argument("--step", help=argparse.SUPPRESS)
    return parser.parse_args()


def main():
    options = parse()
    if options.step:
        return run_step(options.step, options.model, options.out)
    steps = {"streamed": "streamed", "torch.onnx.export": "plain"}
    if options.skip_plain:
        del steps["torch.onnx.export"]
    rows = {}
    for name, step in steps.items():
        rows[name] = measure(step, options.model, options.out / "work")
    print_table(rows)


if __name__ == "__main__":
    main()
