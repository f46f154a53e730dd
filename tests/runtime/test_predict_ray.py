"""predict on Ray (`make test-ray`): the file of the local run, in order, whole, although actors and runs die."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import paths
import pytest

from runtime.common.errors import ToolkitError, run_command
from runtime.predict import __main__ as predict
from runtime.predict import on_ray
from runtime.predict.questions import BadLine

ROOT = paths.ROOT
GOLDEN = paths.GOLDEN / "visualglm"
FIXED = [
    "--vision",
    "torch",
    "--temperature",
    "0",
    "--max-tokens",
    "3",
    "--max-model-len",
    "256",
    "--batch-size",
    "4",
]
LINES = 500
RAY = ["--engine", "ray", "--actors", "2"]

TIMES = ("seconds", "picture_process_time")


def argv(file, out, *more):
    return ["--model", str(GOLDEN), "--input", str(file), "--out", str(out), *FIXED, *more]


def answers(path):
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in found]


# what needs no Ray


def test_ray_is_missing(tmp_path, monkeypatch, capsys):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    monkeypatch.setitem(sys.modules, "ray", None)
    assert (
        run_command(
            predict.main, argv(tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--engine", "ray")
        )
        == 3
    )
    assert "--engine ray needs ray; run: pip install 'ascend-vlm[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--actors", "2"], "--actors is 2: 1 or more is needed, and --engine ray"),
        (["--engine", "ray", "--actors", "0"], "--actors is 0"),
        (["--engine", "slurm"], "--engine is 'slurm': use one of local, ray"),
    ],
)
def test_mistakes(more, sentence, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    assert (
        run_command(predict.main, argv(tmp_path / "in.jsonl", tmp_path / "out.jsonl", *more)) == 2
    )
    assert sentence in capsys.readouterr().err


class Cluster:
    """Of Ray's functions those that `plan_actors` and `actor_engine_options` ask."""

    def __init__(self, machines, **resources):
        self.machines = machines
        self.resources = resources

    def nodes(self):
        return [{"Alive": i < self.machines} for i in range(self.machines + 1)]

    def cluster_resources(self):
        return self.resources


@pytest.mark.parametrize(
    "cluster, engine, actors, expected",
    [
        (Cluster(1, CPU=16.0), {}, None, (1, {"num_cpus": 16})),
        (Cluster(3, CPU=48.0), {}, None, (3, {"num_cpus": 16})),
        (Cluster(1, CPU=16.0), {}, 3, (3, {"num_cpus": 5})),
        (
            Cluster(2, CPU=8.0, NPU=16.0),
            {"device": "npu"},
            None,
            (16, {"num_cpus": 1, "resources": {"NPU": 1}}),
        ),
        (
            Cluster(2, CPU=8.0, NPU=16.0),
            {"device": "npu", "tensor_parallel_size": 4},
            3,
            (3, {"num_cpus": 1, "resources": {"NPU": 4}}),
        ),
    ],
)
def test_who_gets_what(cluster, engine, actors, expected):
    assert on_ray.plan_actors(cluster, predict.EngineOptions(**engine), actors) == expected


@pytest.mark.parametrize(
    "cluster, engine, actors, sentence",
    [
        (Cluster(1, CPU=2.0), {}, 3, "has 2 CPUs"),
        (Cluster(1, CPU=2.0), {"device": "npu"}, None, "has 0 NPUs, 1 are needed"),
        (
            Cluster(1, CPU=2.0, NPU=8.0),
            {"device": "npu", "tensor_parallel_size": 4},
            3,
            "has 8 NPUs, 12 are needed",
        ),
    ],
)
def test_more_than_there_is(cluster, engine, actors, sentence):
    with pytest.raises(ToolkitError, match=sentence):
        on_ray.plan_actors(cluster, predict.EngineOptions(**engine), actors)


def test_actors_of_one_machine_share_its_memory_and_see_only_their_npu():
    options = predict.EngineOptions(memory_utilization=0.9)
    assert on_ray.actor_engine_options(Cluster(2, CPU=8.0), options, 4).memory_utilization == 0.45
    assert (
        on_ray.actor_engine_options(
            Cluster(2, NPU=8.0), predict.EngineOptions(device="npu:3"), 4
        ).device
        == "npu:0"
    )


def test_lost_batches_become_errors_in_their_places():
    batches = [
        [{"prompt": "a"}],
        [{"prompt": "b"}, BadLine("no JSON", 3)],
        [{"prompt": "c"}],
        [{"prompt": "d"}],
    ]
    rows = [{"number": n, "lines": json.dumps([{"answer": n}]), "refused": "null"} for n in (0, 2)]
    found = list(on_ray.fill_lost_batches(rows, batches))
    assert [found[0], found[2]] == [[{"answer": 0}], [{"answer": 2}]] and len(found) == 4
    assert [line["error"].split(",")[0] for line in found[1] + found[3]] == [
        "the process that computed it died or failed",
        "line 3: no JSON",
        "the process that computed it died or failed",
    ]


# with Ray


def with_ray():
    return pytest.importorskip("ray", reason="run: make test-ray")


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """500 questions, some of them bad, and the answers of the undisturbed local run."""
    with_ray()
    folder = tmp_path_factory.mktemp("job")
    (folder / "image.png").write_bytes((GOLDEN / "image.png").read_bytes())
    questions = [
        json.dumps(
            {"prompt": f"What is {i}?", "id": i, **({"image": "image.png"} if i % 5 == 0 else {})}
        )
        if i % 97
        else "no json"
        for i in range(LINES)
    ]
    file = folder / "in.jsonl"
    file.write_text("\n".join(questions), encoding="utf-8")
    assert run_command(predict.main, argv(file, folder / "local.jsonl")) == 1
    return file, answers(folder / "local.jsonl")


def begin(file, out, *more):
    with open(out.with_suffix(".log"), "w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "runtime.predict", *argv(file, out, *more)],
            cwd=ROOT,
            stderr=log,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )


def wait_for_lines(process, out, count):
    partial = out.with_name(out.name + ".partial")
    while not partial.exists() or partial.read_bytes().count(b"\n") <= count:
        assert process.poll() is None, out.with_suffix(".log").read_text()
        time.sleep(0.02)


def actors_of(process) -> list[int]:
    """Process ids of the actors that this run started: Ray titles them."""
    parents = {}
    titles = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(status.parent.name)] = int(status.read_text().rpartition(")")[2].split()[1])
            titles[int(status.parent.name)] = (status.parent / "cmdline").read_text()
        except (OSError, IndexError):  # ended meanwhile
            continue

    def ours(pid):
        return pid == process.pid or (pid in parents and ours(parents[pid]))

    return [pid for pid, title in titles.items() if "BatchActor" in title and ours(pid)]


def test_an_actor_killed_half_way(job, tmp_path):
    file, expected = job
    out = tmp_path / "out.jsonl"
    process = begin(file, out, *RAY)
    wait_for_lines(process, out, LINES // 2)
    actors = actors_of(process)
    assert len(actors) == 2
    os.kill(actors[0], signal.SIGKILL)
    assert process.wait(300) == 1, out.with_suffix(
        ".log"
    ).read_text()  # 1: there are lines that are no questions
    assert answers(out) == expected


@pytest.mark.parametrize("more", [RAY, []])
def test_a_run_killed_half_way_goes_on_with_ray_or_without(more, job, tmp_path):
    file, expected = job
    out = tmp_path / "out.jsonl"
    process = begin(file, out, *RAY)
    wait_for_lines(process, out, LINES // 2)
    process.kill()
    process.wait()
    assert not out.exists()
    process = begin(file, out, *more)
    assert process.wait(300) == 1, out.with_suffix(".log").read_text()
    assert (
        answers(out) == expected
        and "continuing after line 2" in out.with_suffix(".log").read_text()
    )


def test_a_question_that_kills_every_actor_fails_alone(job, tmp_path, monkeypatch, capsys):
    with_ray()

    class Fragile(on_ray.BatchActor):  # pickled by value, as it is local
        def __call__(self, batch):
            if b"deadly" in batch["questions"][0]:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    monkeypatch.setattr(on_ray, "BatchActor", Fragile)
    file = tmp_path / "in.jsonl"
    file.write_text(
        "\n".join(
            json.dumps({"prompt": "deadly" if i == 9 else f"What is {i}?", "id": i})
            for i in range(24)
        )
    )
    out = tmp_path / "out.jsonl"
    assert run_command(predict.main, argv(file, out, *RAY)) == 1
    found = answers(out)
    assert [line["id"] for line in found] == list(range(24))
    assert [line["id"] for line in found if "error" in line] == [8, 9, 10, 11]
    assert "24 lines, 4 failed" in capsys.readouterr().out


def test_a_model_that_does_not_load_is_told_in_its_own_sentence(job, tmp_path, capsys):
    with_ray()
    file, _ = job
    assert (
        run_command(
            predict.main, argv(file, tmp_path / "out.jsonl", *RAY, "--max-model-len", "999999")
        )
        == 2
    )
    shown = capsys.readouterr().err
    assert "error: " in shown and "999999" in shown and "Traceback" not in shown
