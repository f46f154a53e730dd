"""Threads: affinity, quotas of control groups (fixture trees), what the user says, what a model needs."""

import os
import subprocess
import sys

import onnxruntime
import pytest
import torch
from paths import GOLDEN, ROOT

from runtime import Engine
from runtime.common import threads
from runtime.vision.onnx_session import session_options

BIG = 1 << 30


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def tree(folder, group: str, files: dict[str, str]):
    """A machine whose process is in `group`, with these files below /sys/fs/cgroup."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(group)
    for name, text in files.items():
        path = folder / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


V1 = "5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n"


@pytest.mark.parametrize(
    "group, files, expected",
    [
        ("0::/\n", {}, 8),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "350000 100000\n"}, 3),  # a fourth would wait for the next period
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "6400000 100000\n"}, 8),
        ("0::/pod/a\n", {"pod/a/cpu.max": "max 100000", "pod/cpu.max": "200000 100000"}, 2),
        ("0::/pod/a\n", {"pod/a/cpu.max": "400000 100000", "pod/cpu.max": "max 100000"}, 4),
        ("0::/../host/a\n", {"cpu.max": "200000 100000"}, 2),
        (V1, {"cpu,cpuacct/docker/a/cpu.cfs_quota_us": "-1"}, 8),
        (
            V1,
            {
                "cpu,cpuacct/docker/a/cpu.cfs_quota_us": "250000",
                "cpu,cpuacct/docker/a/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        (V1, {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        (V1 + "0::/\n", {"cpu.max": "500000 100000"}, 5),
    ],
)
def test_quotas(group, files, expected, tmp_path):
    assert threads.usable(tree(tmp_path, group, files)) == expected


def test_affinity(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5})
    assert threads.usable(tmp_path) == 2
    assert threads.usable(tree(tmp_path, "0::/\n", {"cpu.max": "100000 100000"})) == 1


@pytest.mark.parametrize("text, expected", [("3", 3), ("5,2", 5), ("16", 16), ("many", 8), ("", 8)])
def test_the_user_decides(text, expected, monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert threads.usable(tmp_path) == expected


def test_a_small_model_takes_one_thread(monkeypatch):
    monkeypatch.setattr(threads, "usable", lambda: 8)
    assert threads.for_decoder(5 << 20) == 1
    assert [threads.for_decoder(BIG, processes) for processes in (1, 2, 16)] == [8, 4, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert threads.for_decoder(5 << 20) == 3 and threads.for_decoder(BIG, 4) == 3


def test_an_engine_sets_torchs_threads(monkeypatch):
    torch.set_num_threads(2)
    Engine(GOLDEN / "glm4", max_model_len=64).close()
    assert torch.get_num_threads() == 1
    monkeypatch.setattr(threads, "ONE_THREAD_UP_TO", 0)
    monkeypatch.setattr(threads, "usable", lambda: 3)
    Engine(GOLDEN / "glm4", max_model_len=64).close()
    assert torch.get_num_threads() == 3


def test_onnx_runtime_has_as_many_and_does_not_spin(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    options = session_options()
    assert isinstance(options, onnxruntime.SessionOptions) and options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert session_options(2).intra_op_num_threads == 2


@pytest.mark.parametrize(
    "given, expected",
    [
        ({}, "500"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
    ],
)
def test_waiting_threads_spin_for_a_bounded_time(given, expected):
    """Set before torch loads OpenMP, unless the user said otherwise."""
    names = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    code = (
        "import os, sys, runtime; assert 'torch' not in sys.modules\n"
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, **given},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [expected]
