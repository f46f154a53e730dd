"""Tensor parallelism on gloo: logits and tokens of one process, and processes that die.

NPUs' own collectives (hccl) are not shown here.
"""

import os
import pickle
import pty
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import paths
import pytest
import torch
from damaged_checkpoints import edited

from runtime import Engine, SamplingParams, chat
from runtime.common.errors import ToolkitError, run_command
from runtime.parallel import workers

ROOT = paths.ROOT
GOLDEN = paths.GOLDEN
FAMILIES = ("visualglm", "glm4", "llava")
TOKENS = [5, 7, 11]
GREEDY = SamplingParams(max_tokens=6, temperature=0, repetition_penalty=1.0, ignore_eos=True)
ATOL = 1e-4
SETTINGS = {"dtype": "float32", "vision": "torch", "max_model_len": 256}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node")
CHAT = [
    "-m",
    "runtime.chat",
    "--model",
    str(GOLDEN / "glm4"),
    "--dtype",
    "fp32",
    "--temperature",
    "0",
    "--repetition-penalty",
    "1",
]


def prompts(engine):
    picture = (
        [{"type": "image", "image": GOLDEN / "visualglm" / "image.png"}]
        if engine.family.vision
        else []
    )
    return [
        engine.prompt(
            [{"role": "user", "content": [*content, {"type": "text", "text": "描述 hello"}]}]
        )
        for content in (picture, [])
    ]


def answers(engine):
    """Of every prompt: prefill logits and teacher-forced logits; greedy tokens of all together."""
    return (
        [engine.prefill_logits(p) for p in prompts(engine)],
        [engine.score(p, TOKENS) for p in prompts(engine)],
        [result.token_ids for result in engine.generate(prompts(engine), GREEDY)],
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{name: folder}; "added tokens" has three more than any number of devices divides."""
    grown = edited(GOLDEN / "glm4", tmp_path_factory.mktemp("grown"), three_more, three_tokens_more)
    return {name: GOLDEN / name for name in FAMILIES} | {"added tokens": grown}


def three_more(tensors):
    """Rows of embedding and output matrix, as a fine-tune with added tokens has them."""
    for name in ("embedding.word_embeddings", "output_layer"):
        matrix = tensors[f"transformer.{name}.weight"]
        tensors[f"transformer.{name}.weight"] = torch.cat((matrix, matrix[:3] * 1.5))


def three_tokens_more(config):
    config |= {"padded_vocab_size": 323, "vocab_size": 323}


@pytest.fixture(scope="module")
def expected(models):
    return {name: answers(Engine(folder, **SETTINGS)) for name, folder in models.items()}


def assert_same(found, expected):
    for ours, theirs in zip(found[:2], expected[:2]):
        for a, b in zip(ours, theirs):
            np.testing.assert_allclose(a, b, atol=ATOL)
    assert found[2] == expected[2]


@pytest.mark.parametrize("size", [2, 4])
def test_logits_and_tokens_of_one_process(models, expected, size, tmp_path):
    """One model after another in a script under torchrun. GLM-4 at 4 has more devices than
    key/value heads."""
    assert expected["added tokens"][0][0].shape[1] == 323
    script = tmp_path / "script.py"
    script.write_text(
        "import pickle, sys\n"
        f"sys.path[:0] = {[str(ROOT), str(paths.TESTS / 'helpers'), str(Path(__file__).parent)]}\n"
        "from test_team import SETTINGS, Engine, answers\n"
        "found = {}\n"
        f"for name, folder in {[(name, str(folder)) for name, folder in models.items()]}:\n"
        f"    engine = Engine(folder, tensor_parallel_size={size}, **SETTINGS)\n"
        "    found[name] = answers(engine)\n"
        "    engine.close()\n"
        f"pickle.dump(found, open({str(tmp_path / 'found')!r}, 'wb'))\n"
    )
    done = subprocess.run(
        [*TORCHRUN, str(size), str(script)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = pickle.loads((tmp_path / "found").read_bytes())
    for name in models:
        assert_same(found[name], expected[name])


def test_engine_starts_and_ends_its_processes(expected):
    engine = Engine(GOLDEN / "glm4", tensor_parallel_size=2, **SETTINGS)
    try:
        assert_same(answers(engine), expected["glm4"])
        assert (
            engine.describe()[1] == "decoder: cpu ops on cpu and 1 more (tensor parallel), float32"
        )
        with pytest.raises(
            ToolkitError, match="has a model that is split over several devices already; close"
        ):
            Engine(GOLDEN / "glm4", tensor_parallel_size=2, **SETTINGS)
        processes = list(workers.workers)
    finally:
        engine.close()
    assert [worker.returncode for worker in processes] == [-signal.SIGKILL]


QUANTISED = GOLDEN / "msmodelslim"


@pytest.mark.parametrize("case", ["glm_f16_w8a8", "glm_f16_w8a8s", "glm_f16_w8a8_dynamic"])
def test_quantised_folders(case):
    """Static layers add up to the same integers; dynamic ones scale each device's channels on their
    own."""
    data = np.load(QUANTISED / case / "golden.npz")
    engine = Engine(QUANTISED / case, tensor_parallel_size=2, dtype="float32", max_model_len=64)
    try:
        found = engine.prefill_logits(engine.prompt_from_ids(data["ids"]))
    finally:
        engine.close()
    error = np.linalg.norm(found - data["float32"]) / np.linalg.norm(data["float32"])
    assert error < (0.05 if "dynamic" in case else 1e-5)


# mistakes


def test_refused_before_a_process_starts(capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(
        ToolkitError,
        match="--tensor-parallel-size 8 does not divide glm-4's 4 attention heads; use 1, 2, 4$",
    ):
        Engine(GOLDEN / "glm4", tensor_parallel_size=8)
    assert run_command(chat.main, [*CHAT[2:], "--prompt", "hi", "--tensor_parallel_size", "3"]) == 2
    assert "--tensor-parallel-size is 3: use 1, 2, 4 or 8" in capsys.readouterr().err


def test_torchrun_with_another_number(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert run_command(chat.main, [*CHAT[2:], "--prompt", "hi", "-tp", "2"]) == 2
    assert "torchrun started 4 processes, --tensor-parallel-size is 2" in capsys.readouterr().err


# processes


def start(*argv, launcher=(sys.executable,), **settings):
    return subprocess.Popen(
        [*launcher, *CHAT, *argv],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **settings,
    )


def children(pid: int) -> list[int]:
    """Process ids of the ranks that a command started, waited for."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [
            int(p)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for p in (task / "children").read_text().split()
        ]
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError("no process was started")


def gone(pid: int) -> bool:
    """Dead, or a zombie that nobody has waited for."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def wait_until_loaded(process):
    for line in process.stderr:
        if "/help" in line:  # the welcome
            return
    raise AssertionError("the conversation did not begin")


def hear_interrupts():
    """Whoever runs the tests in the background may have switched SIGINT off for all below it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_killed_rank_ends_all_with_one_message():
    process = start("-tp", "2", "--max-tokens", "480")
    ranks = children(process.pid)
    wait_until_loaded(process)
    process.stdin.write("hello\n" * 50)
    process.stdin.flush()
    process.stdout.read(1)  # the first answer has begun
    os.kill(ranks[0], signal.SIGKILL)
    process.wait(timeout=300)  # before its input ends, which would be an ordinary end
    err = process.stderr.read()
    errors = [line for line in err.splitlines() if "error" in line.lower()]
    assert process.returncode == 1 and errors == [
        "error: process 1 of 2 (tensor parallel) was killed by SIGKILL; all were ended, run the same command again"
    ]
    assert all(gone(rank) for rank in ranks) and "Traceback" not in err


def test_no_orphans_when_rank_0_is_killed():
    process = start("-tp", "2")
    ranks = children(process.pid)
    wait_until_loaded(process)
    process.kill()
    process.communicate()
    assert all(gone(rank) for rank in ranks)


def test_ctrl_c_of_a_one_shot_question_ends_all():
    process = start(
        "-tp",
        "2",
        "--prompt",
        "hi",
        "--max-tokens",
        "480",
        start_new_session=True,
        preexec_fn=hear_interrupts,
    )
    ranks = children(process.pid)
    process.stdout.read(1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "interrupted" in err and all(gone(rank) for rank in ranks)


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on():
    """In a terminal, whose Ctrl-C goes to the whole group of processes."""
    pid, terminal = pty.fork()
    if not pid:
        hear_interrupts()
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, *CHAT, "-tp", "2", "--max-tokens", "480"])
    read_until(terminal, b"> ")
    os.write(terminal, b"hello\n")
    read_until(terminal, b"hello\r\n", 8)
    os.write(terminal, b"\x03")
    assert b"stopped" in read_until(terminal, b"> ")
    os.write(terminal, b"and now\n")
    assert b"Traceback" not in read_until(terminal, b"answer ")
    ranks = children(pid)
    os.write(terminal, b"/stop\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and all(
        gone(rank) for rank in ranks
    )
    os.close(terminal)


def read_until(terminal, mark: bytes, more=0) -> bytes:
    seen = b""
    while mark not in seen or len(seen.partition(mark)[2]) < more:
        seen += os.read(terminal, 1024)
    return seen


def test_torchrun():
    """The command as a module; only rank 0 prints."""
    question = ["--prompt", "hi", "--max-tokens", "6"]
    process = start(*question, "-tp", "2", launcher=(*TORCHRUN, "2"))
    out, err = process.communicate(timeout=600)
    engine = Engine(GOLDEN / "glm4", dtype="float32")
    prompt = engine.prompt([{"role": "user", "content": "hi"}])
    assert process.returncode == 0, err
    assert out == "".join(engine.stream(prompt, replace(GREEDY, ignore_eos=False))) + "\n"


def test_a_rank_that_cannot_load_says_why(monkeypatch):
    """The other rank sees another checkpoint: its sentence is the message."""
    code = (
        "import os, runtime.parallel.team as p; load = p.Team.send\n"
        "p.Team.send = lambda team, kind, **sent: load(team, kind, **{**sent, 'model_dir': '/nowhere'})\n"
        f"from runtime import Engine; Engine({str(GOLDEN / 'glm4')!r}, tensor_parallel_size=2, vision='torch')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        "error: process 1 of 2 (tensor parallel) failed: model folder /nowhere does not exist"
        in done.stderr
    )


# who may talk to the ranks


def listening_addresses(pids: list[int]) -> set[str]:
    """Hexadecimal addresses on which these processes listen, as /proc/net has them."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            sockets.add(os.readlink(descriptor))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and f"socket:[{inode}]" in sockets:
                found.add(local.partition(":")[0])
    return found


def test_ranks_listen_on_the_loopback_alone(monkeypatch, tmp_path):
    """Whatever interface the user named for other programs."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    process = start("-tp", "2")
    ranks = children(process.pid)
    wait_until_loaded(process)
    [folder] = tmp_path.glob("ascend-vlm-team-*")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert listening_addresses([process.pid, *ranks]) == {"0100007F"}  # 127.0.0.1
    process.communicate("/stop\n", timeout=300)
    assert not list(tmp_path.glob("ascend-vlm-team-*"))


def test_torchrun_ranks_with_different_secrets_end(tmp_path):
    """As on two machines of which one has another file, or as one who is not this user."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        f"os.environ['ASCEND_VLM_CACHE'] = {str(tmp_path)!r} + '/' + os.environ['RANK']\n"
        "from runtime import chat\n"
        "from runtime.common.errors import run_command\n"
        f"sys.exit(run_command(chat.main, {[*CHAT[2:], '--prompt', 'hi', '-tp', '2']}))\n"
    )
    done = subprocess.run(
        [*TORCHRUN, "2", str(script)], capture_output=True, text=True, timeout=600, cwd=tmp_path
    )
    assert done.returncode and "does not hold this process's secret; on several" in done.stderr
