"""The comparison with other runtimes: ratios by their definition, and what a missing peer does to the page."""

import importlib.util
import json
import sys

import paths
import pytest

ROOT = paths.ROOT


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_peers", ROOT / "benchmarks/bench_peers.py")
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def run(name, batch=1, number=0, **figures):
    return {
        "name": name,
        "round": number,
        "batch": batch,
        "version": name.split()[0] + " 1",
        **figures,
    }


RUNS = [
    run("transformers bfloat16", token_s=0.3, first_s=2.0),
    run("llamacpp f16", token_s=0.1, first_s=4.0),
    *(
        run("ours bfloat16", number=i, token_s=t, first_s=1.0, roofline=0.8)
        for i, t in enumerate((0.1, 0.9, 0.08))
    ),
    run("openvino int8", token_s=0.05, first_s=1.5),
    run("llamacpp q8_0", error="failed: no such file"),
    run("ours int8", token_s=0.04, first_s=1.0),
    run("ours int8, batch 8", batch=8, token_s=0.08, first_s=5.0),
]


def test_medians_and_targets(bench):
    rows = bench.table.medians(RUNS)
    assert rows["ours bfloat16"]["token_s"] == 0.1 and rows["ours bfloat16"]["rounds"] == 3
    assert rows["ours int8, batch 8"]["tokens_per_s"] == pytest.approx(100)
    found = {
        row["target"]: row for row in bench.table.judge(bench.CASES["glm-edge-1.5b"].targets, rows)
    }
    values = [row["measured"] for row in found.values()]
    assert values == pytest.approx([3.0, 1.0, 1.25, None, 1.5, 0.8, None, 4.0])
    assert [row["verdict"] for row in found.values()] == [
        "met",
        "not met",
        "met",
        "not measured",
        "met",
        "met",
        "not measured",
        "not met",
    ]
    [int8] = [row for text, row in found.items() if text.startswith("decode int8 vs")]
    assert int8["without"] == ["llamacpp q8_0"]


def test_targets_name_rows_that_are_measured(bench):
    for case in bench.CASES.values():
        assert {name for target in case.targets for name in (target.ours, *target.peers)} <= {
            e.name for e in case.entries
        }


def options(bench, work, *more):
    return ["--model", "glm-edge-1.5b", "--work", str(work), "--prompt", "16", "--new", "4", *more]


@pytest.fixture
def stand_in(bench, monkeypatch):
    """Workers and probe that measure nothing: the peer's environment is missing for llama.cpp, OpenVINO's run fails."""
    jobs = []

    def worker(entry, job):
        jobs.append((entry.name, job["task"], job.get("seed")))
        if job["task"] == "build":
            return {}, None
        if entry.peer == "openvino":
            return {}, "failed (exit status 1): RuntimeError: no | such CPU"
        return {
            "first_s": 1.0,
            "token_s": 0.05,
            "version": entry.peer,
            "settings": "",
            "peak_bytes": 1e9,
        }, None

    class Probe:
        def __init__(self, *args):
            pass

        def read(self):
            return 50e9

    monkeypatch.setattr(bench, "run_worker", worker)
    monkeypatch.setattr(bench, "Probe", Probe)
    monkeypatch.setattr(bench, "prepare", lambda case, work: {"work": str(work)})
    monkeypatch.setattr(bench, "streamed_bytes", lambda *args: 2e9)
    monkeypatch.setattr(
        bench.environment,
        "install",
        lambda peer: "could not be installed: no cmake" if peer == "llamacpp" else None,
    )
    return jobs


def test_peers_that_fail_are_named_and_the_others_go_on(bench, stand_in, tmp_path, capsys):
    assert bench.main(options(bench, tmp_path, "--rounds", "2")) == 0
    page = capsys.readouterr().out
    assert page.strip() == (tmp_path / "peers.md").read_text().strip()
    assert "| llamacpp q4_0 | could not be installed: no cmake |" in page
    assert "| openvino int8 | failed (exit status 1): RuntimeError: no \\| such CPU |" in page
    assert (
        "| decode bf16 vs llama.cpp F16 | 1.05 | - | not measured (without llamacpp f16) |" in page
    )
    found = json.loads((tmp_path / "peers.json").read_text())
    assert (
        found["rows"]["ours int8"]["roofline"] == pytest.approx(0.8)
        and found["rows"]["ours int8"]["rounds"] == 2
    )


def test_a_stopped_run_goes_on(bench, stand_in, tmp_path, monkeypatch):
    working = bench.run_worker
    seen = []

    def interrupted(entry, job):
        seen.append(entry.name)
        if job["task"] == "run" and job["seed"] == 1:
            raise KeyboardInterrupt
        return working(entry, job)

    monkeypatch.setattr(bench, "run_worker", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.main(options(bench, tmp_path, "--rounds", "2", "--only", "ours"))
    monkeypatch.setattr(bench, "run_worker", working)
    stand_in.clear()
    assert bench.main(options(bench, tmp_path, "--rounds", "2", "--only", "ours")) == 0
    assert {seed for _, task, seed in stand_in if task == "run"} == {1}
    stand_in.clear()
    assert (
        bench.main(options(bench, tmp_path, "--rounds", "1", "--only", "ours int8", "--fresh")) == 0
    )
    assert [name for name, task, _ in stand_in if task == "run"] == ["ours int8"]
    missing = json.loads((tmp_path / "peers.json").read_text())["missing"]
    assert missing["ours bfloat16"] == "was not run" and "ours int8" not in missing


def test_a_worker_that_dies_gives_its_last_words(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench.environment, "python_of", lambda peer: sys.executable)
    entry = bench.Entry("openvino", "int8")
    job = {
        "task": "run",
        "work": str(tmp_path),
        "checkpoint": str(tmp_path / "none"),
        "threads": 1,
        "prompt": 4,
        "new": 2,
    }
    found, error = bench.run_worker(entry, job)
    assert (
        found == {}
        and "failed (exit status 1): ModuleNotFoundError: No module named 'openvino'" in error
    )


def test_our_own_worker_on_a_small_model(bench, tmp_path):
    from models.synthetic.write import write_checkpoint

    write_checkpoint(
        "glm-edge-1.5b-chat", tmp_path / "checkpoint", "tiny", report=lambda line: None
    )
    entry = bench.Entry("ours", "int8", batch=2)
    job = {
        "work": str(tmp_path),
        "checkpoint": str(tmp_path / "checkpoint"),
        "threads": 1,
        "prompt": 24,
        "new": 4,
    }
    found, error = bench.run_worker(entry, job | {"task": "run"})
    assert (
        error is None
        and found["first_s"] > 0
        and found["token_s"] > 0
        and "int8" in found["settings"]
    )
    assert 50e6 < found["peak_bytes"] < 4e9
    assert {folder.name for folder in (tmp_path / "ours-int8").iterdir()} >= {"packed"}


def test_the_plain_encoder_is_measured_without_the_engine(bench, tmp_path):
    from models.synthetic.write import write_checkpoint

    write_checkpoint("llava-1.5-7b", tmp_path / "checkpoint", "tiny", report=lambda line: None)
    job = {
        "work": str(tmp_path),
        "checkpoint": str(tmp_path / "checkpoint"),
        "threads": 1,
        "repeats": 1,
        "task": "run",
    }
    found, error = bench.run_worker(bench.Entry("ours", "eager"), job)
    assert error is None and found["encode_s"] > 0
