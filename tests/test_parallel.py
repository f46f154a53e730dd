"""Tensor parallelism on gloo: logits and tokens of one process, what cannot be split, and processes that die.

NPUs' own collectives (hccl) are not shown here; on the NPU operators only the places of the collectives are.
"""
import os
import pty
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import family_of
from models.base import Part, Weight
from models.checkpoint import Checkpoint
from models.decoder import Decoder, Step
from runtime import Engine, SamplingParams, chat, parallel
from runtime.cache import KVCache
from runtime.errors import ToolkitError, run_command
from runtime.loading import decoder_weights
from runtime.ops.npu import NpuOps
from runtime.ops.reference import ReferenceOps
from runtime.ops.socs import A2, P310
from runtime.plan import make_plan
from runtime.split import Split, check_split

sys.path.insert(0, str(Path(__file__).parent / "npu"))
import cpu_kernels

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"
FAMILIES = ("visualglm", "glm4", "llava")
TOKENS = [5, 7, 11]
GREEDY = SamplingParams(max_tokens=6, temperature=0, repetition_penalty=1.0, ignore_eos=True)
ATOL = 1e-4
SETTINGS = {"dtype": "float32", "vision": "torch", "max_model_len": 256}
CHAT = ["-m", "runtime.chat", "--model", str(GOLDEN / "glm4"), "--dtype", "fp32", "--temperature", "0",
        "--repetition-penalty", "1"]


def prompts(engine):
    picture = [{"type": "image", "image": GOLDEN / "visualglm" / "image.png"}] if engine.family.vision else []
    return [engine.prompt([{"role": "user", "content": [*content, {"type": "text", "text": "描述 hello"}]}])
            for content in (picture, [])]


def answers(engine):
    """Of every prompt: prefill logits and teacher-forced logits; greedy tokens of all together."""
    return ([engine.prefill_logits(p) for p in prompts(engine)], [engine.score(p, TOKENS) for p in prompts(engine)],
            [result.token_ids for result in engine.generate(prompts(engine), GREEDY)])


@pytest.mark.parametrize("name, size", [*((name, 2) for name in FAMILIES), *((name, 4) for name in FAMILIES)])
def test_logits_and_tokens_of_one_process(name, size):
    """GLM-4 at 4 has more devices than key/value heads."""
    prefill, scores, tokens = answers(Engine(GOLDEN / name, **SETTINGS))
    engine = Engine(GOLDEN / name, tensor_parallel_size=size, **SETTINGS)
    try:
        for found, expected in zip(answers(engine), (prefill, scores)):
            for a, b in zip(found, expected):
                np.testing.assert_allclose(a, b, atol=ATOL)
        assert answers(engine)[2] == tokens
        with pytest.raises(ToolkitError, match="has a model that is split over several devices already; close"):
            Engine(GOLDEN / name, tensor_parallel_size=size, **SETTINGS)
        workers = list(parallel._workers)
    finally:
        engine.close()
    assert len(workers) == size - 1 and all(worker.returncode == -signal.SIGKILL for worker in workers)


# weights

class Sum:
    """Stands in for a team inside one process: remembers what would be summed or gathered."""
    def __init__(self):
        self.calls = Counter()

    def all_reduce(self, x):
        self.calls["all_reduce"] += 1
        return x

    def gather(self, x):
        self.calls["gather"] += 1
        return x


def loaded(family, split):
    checkpoint = Checkpoint(family.directory)
    return decoder_weights(checkpoint, family, torch.float32, "cpu", ReferenceOps(), split)


@pytest.mark.parametrize("name", [*FAMILIES, "glm_edge", "glm4v", "glm4/hf"])
@pytest.mark.parametrize("size", [2, 4])
def test_weights_of_all_ranks_are_those_of_one(name, size):
    """Products of the parts, summed or laid side by side, are the product of the whole."""
    family = family_of(GOLDEN / name)
    whole, parts = loaded(family, Split(family.decoder)), [loaded(family, Split(family.decoder, size, r)) for r in range(size)]
    assert torch.equal(torch.cat([p["lm_head.weight"] for p in parts]), whole["lm_head.weight"])
    for layer in range(family.decoder.layers):
        for kind in ("out", "down"):
            name = f"layers.{layer}.{kind}"
            assert torch.equal(torch.cat([p[name + ".weight"] for p in parts], 1), whole[name + ".weight"])
            assert [name + ".bias" in p for p in parts] == [name + ".bias" in whole] + [False] * (size - 1)
    c, d = family.decoder, family.decoder.head_dim
    q, k, v = whole["layers.0.qkv.weight"].split([c.heads * d, c.kv_heads * d, c.kv_heads * d])
    for rank, part in enumerate(parts):
        local = Split(c, size, rank).config
        mine = part["layers.0.qkv.weight"].split([local.heads * d, local.kv_heads * d, local.kv_heads * d])
        head = rank * c.heads // size * c.kv_heads // c.heads       # key/value head that this rank's first query uses
        rows = slice(head * d, (head + local.kv_heads) * d)
        assert torch.equal(mine[0], q.chunk(size)[rank]) and torch.equal(mine[1], k[rows]) and torch.equal(mine[2], v[rows])


@pytest.mark.parametrize("name", ["visualglm", "glm4", "llava", "glm_edge"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_plan_counts_what_the_first_device_loads(name, size):
    family = family_of(GOLDEN / name)
    split = Split(family.decoder, size)
    plan = make_plan(family, "float32", 128, size)
    assert plan.weights == sum(tensor.nbytes for tensor in loaded(family, split).values())
    cache = KVCache(split.config, 8, 16, torch.float32, "cpu", ReferenceOps())
    assert plan.cache == sum(tensor.nbytes for pair in cache.layers for tensor in pair)


def test_a_rank_reads_only_its_rows(monkeypatch):
    family, read = family_of(GOLDEN / "llava"), Counter()
    checkpoint = Checkpoint(family.directory)
    plain = checkpoint._reader.tensor
    monkeypatch.setattr(checkpoint._reader, "tensor",
                        lambda name, entry: read.update({name.split("model.")[-1]: entry.nbytes}) or plain(name, entry))
    decoder_weights(checkpoint, family, torch.float32, "cpu", ReferenceOps(), Split(family.decoder, 4, 3))
    sizes = {name.split("model.")[-1]: checkpoint.nbytes(name) for name in checkpoint.names}
    narrowed = {name for name in read if name.endswith(("q_proj.weight", "gate_proj.weight", "lm_head.weight"))}
    assert len(narrowed) == 2 * family.decoder.layers + 1
    assert all(read[name] * 4 == sizes[name] for name in narrowed)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_rows_of_a_tensor_that_many_parts_take(tmp_path, suffix):
    tensor = torch.arange(24.0).view(6, 4)
    if suffix == ".bin":
        torch.save({"x": tensor}, tmp_path / "pytorch_model.bin")
    else:
        from safetensors.torch import save_file
        save_file({"other": torch.ones(3), "x": tensor}, tmp_path / "model.safetensors")
    parts = (Part("a", take=(1, 3)), Part("b", take=(4, 6), at=(0, 4)), Part("b", take=(0, 2), at=(2, 4)))
    table = [Weight("x", (6, 4), parts)]
    counted = []
    found = dict(Checkpoint(tmp_path).assemble(table, progress=lambda *bytes_: counted.append(bytes_)))
    assert torch.equal(found["a"], tensor[1:3]) and torch.equal(found["b"], torch.cat((tensor[4:], tensor[:2])))
    assert counted[-1] == (96, 96)


# what cannot be split

@pytest.mark.parametrize("changes, size, wrong", [
    ({"heads": 6}, 4, "6 attention heads"), ({"ffn": 98}, 4, "98 feed-forward channels"),
    ({"vocab_size": 321}, 2, "321 vocabulary rows"), ({"heads": 24, "kv_heads": 6}, 4, "6 key/value heads")])
def test_refusals(changes, size, wrong):
    family = family_of(GOLDEN / "glm4")
    family.decoder = replace(family.decoder, **changes)
    with pytest.raises(ToolkitError, match=f"--tensor-parallel-size {size} does not divide glm-4's {wrong}; use 1"):
        check_split(family, size)


def test_refused_before_a_process_starts(capsys, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(ToolkitError, match="--tensor-parallel-size 8 does not divide glm-4's 4 attention heads; use 1, 2, 4$"):
        Engine(GOLDEN / "glm4", tensor_parallel_size=8)
    assert run_command(chat.main, [*CHAT[2:], "--prompt", "hi", "--tensor_parallel_size", "3"]) == 2
    assert "--tensor-parallel-size is 3: use 1, 2, 4 or 8" in capsys.readouterr().err


def test_quantised_checkpoint_is_refused(tmp_path):
    family = family_of(GOLDEN / "glm4")
    family.directory = tmp_path
    (tmp_path / "quant_model_description.json").write_text("{}")
    with pytest.raises(ToolkitError, match="a quantised checkpoint runs on one device only"):
        check_split(family, 2)
    check_split(family, 1)


def test_torchrun_with_another_number(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    assert run_command(chat.main, [*CHAT[2:], "--prompt", "hi", "-tp", "2"]) == 2
    assert "torchrun started 4 processes, --tensor-parallel-size is 2" in capsys.readouterr().err


# processes

def start(*argv, launcher=(sys.executable,), **settings):
    return subprocess.Popen([*launcher, *CHAT, *argv], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **settings)


def children(process) -> list[int]:
    """Process ids of the ranks that a command started, waited for."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = [int(p) for task in Path(f"/proc/{process.pid}/task").iterdir()
                 for p in (task / "children").read_text().split()]
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
        if "/help" in line:         # the welcome
            return
    raise AssertionError("the conversation did not begin")


@pytest.mark.parametrize("busy", [False, True], ids=["waiting for a question", "answering"])
def test_killed_rank_ends_all_with_one_message(busy):
    process = start("-tp", "2", "--max-tokens", "480")
    ranks = children(process)
    wait_until_loaded(process)
    if busy:
        process.stdin.write("hello\n" * 50)
        process.stdin.flush()
        process.stdout.read(1)      # the first answer has begun
    os.kill(ranks[0], signal.SIGKILL)
    process.wait(timeout=60)        # before its input ends, which would be an ordinary end
    err = process.stderr.read()
    errors = [line for line in err.splitlines() if "error" in line.lower()]
    assert process.returncode == 1 and errors == [
        "error: process 1 of 2 (tensor parallel) was killed by SIGKILL; all were ended, run the same command again"]
    assert all(gone(rank) for rank in ranks) and "Traceback" not in err


def test_no_orphans_when_rank_0_is_killed():
    process = start("-tp", "2")
    ranks = children(process)
    wait_until_loaded(process)
    process.kill()
    process.communicate()
    assert all(gone(rank) for rank in ranks)


def test_end_of_input_ends_all():
    process = start("-tp", "2")
    ranks = children(process)
    process.communicate(timeout=60)
    assert process.returncode == 0 and all(gone(rank) for rank in ranks)


def test_ctrl_c_of_a_one_shot_question_ends_all():
    process = start("-tp", "2", "--prompt", "hi", "--max-tokens", "480", start_new_session=True)
    ranks = children(process)
    process.stdout.read(1)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted" in err and all(gone(rank) for rank in ranks)


def test_ctrl_c_stops_an_answer_and_the_conversation_goes_on():
    """In a terminal, whose Ctrl-C goes to the whole group of processes."""
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(ROOT)
        os.execv(sys.executable, [sys.executable, *CHAT, "-tp", "2", "--max-tokens", "480"])
    seen = read_until(terminal, b"> ")
    os.write(terminal, b"hello\n")
    seen = read_until(terminal, b"hello\r\n", 8)
    os.write(terminal, b"\x03")
    assert b"stopped" in read_until(terminal, b"> ")
    os.write(terminal, b"and now\n/stop\n")
    seen = read_until(terminal, b"answer ")
    assert b"Traceback" not in seen
    os.write(terminal, b"/stop\n")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    os.close(terminal)


def read_until(terminal, mark: bytes, more=0) -> bytes:
    seen = b""
    while mark not in seen or len(seen.partition(mark)[2]) < more:
        seen += os.read(terminal, 1024)
    return seen


def test_torchrun():
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
    alone, together = start("--prompt", "hi", "--max-tokens", "6"), start("--prompt", "hi", "--max-tokens", "6", "-tp", "2",
                                                                         launcher=launcher)
    outputs = [process.communicate(timeout=90) for process in (alone, together)]
    assert together.returncode == 0, outputs[1][1]
    assert outputs[0][0] == outputs[1][0] and outputs[0][0].strip()


def test_a_rank_that_cannot_load_says_why(monkeypatch):
    """The other rank sees another checkpoint: its sentence is the message."""
    code = ("import os, runtime.parallel as p; load = p.Team.send\n"
            "p.Team.send = lambda team, message: load(team, ('load', ('/nowhere', message[1][1])))\n"
            f"from runtime import Engine; Engine({str(GOLDEN / 'glm4')!r}, tensor_parallel_size=2, vision='torch')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: process 1 of 2 (tensor parallel) failed: model folder /nowhere does not exist" in done.stderr


# the places of the collectives on the NPU operators

class Launched(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def one_token(family, soc, team):
    cpu_kernels.declare()
    size = 2 if team else 1
    ops, split = NpuOps(soc, "cpu"), Split(family.decoder, size)
    ops.team = team
    weights = decoder_weights(Checkpoint(family.directory), family, torch.float32, "cpu", ops, split)
    decoder, cache = Decoder(split.config, weights, ops), KVCache(split.config, 2, 16, torch.float32, "cpu", ops)
    turn = torch.zeros(1, split.config.head_dim)
    table = torch.tensor([[0]], dtype=torch.int32)
    step = ops.begin(Step(turn, turn, torch.tensor([0]), table, [1], [1]), split.config, "cpu")
    with torch.inference_mode(), Launched() as launched:
        decoder.logits(decoder.forward(decoder.embed(torch.tensor([3])), step, cache))
    return launched.names


@pytest.mark.parametrize("soc", [A2, P310], ids=lambda soc: soc.name.split()[1])
@pytest.mark.parametrize("name", FAMILIES)
def test_collectives_are_all_that_the_launches_gain(name, soc):
    family, team = family_of(GOLDEN / name), Sum()
    soc = replace(soc, dtypes=("float32",), block_sizes=(16,), swiglu_multiple=2)     # half of a tiny layer is no 32
    assert one_token(family, soc, team) == one_token(family, soc, None)
    assert team.calls == {"all_reduce": 2 * family.decoder.layers, "gather": 1}
