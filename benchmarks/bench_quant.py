"""Quantising against msmodelslim's whole-model run, and W8A8 against bfloat16 on this CPU.

    python benchmarks/bench_quant.py [--layers 20] [--work FOLDER]

Both sides quantise on the same samples. A random GLM (286 M parameters with 20 layers) is made in
FOLDER, and one as wide as GLM-Edge-1.5B with 4 layers for the second part. Prints seconds, CPU
seconds (which a busy machine does not lengthen), peak memory and ratios, all measured in one run,
each quantisation in a process of its own. Times include loading Python packages on both sides
(byte-compiled before, as pip leaves them), and on ours the quality gate, which msmodelslim does not
have; ratios are printed with and without it.
"""

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = 9  # to calibrate on
HELD_OUT = 3  # to judge on
TOKENS = 128  # of a sample
VOCAB = 32000
PREFILL = 512  # tokens
DECODE = 32  # tokens
ROUNDS = 3
WIDE = {"hidden": 2048, "ffn": 8192}
IMPORTED = "import msmodelslim.pytorch.llm_ptq.anti_outlier, transformers.models.glm.modeling_glm\n"

CLASSIC = """
import os, sys, json, tempfile, torch
from transformers import AutoModelForCausalLM
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig
model, lines, out, dtype = sys.argv[1:]
lines = [json.loads(line)["ids"] for i, line in enumerate(open(lines)) if i % 4 != 3]
data = [[torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)] for ids in lines]
os.chdir(tempfile.mkdtemp())
model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
config = QuantConfig(w_bit=8, a_bit=8, act_method=1, dev_type="cpu", mm_tensor=False, pr=1.0)
calibrator = Calibrator(model, config, calib_data=data, disable_level="L0")
calibrator.run()
calibrator.save(out, save_type=["ascendV1"], part_file_size=1)
"""


def make_model(folder: Path, layers: int, hidden: int = 1024, ffn: int = 2816):
    """Write a GLM in the -hf layout, bfloat16, weights from a seed -> number of parameters."""
    from safetensors.torch import save_file

    from models import family_of

    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["GlmForCausalLM"],
        "model_type": "glm",
        "attention_bias": True,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "max_position_embeddings": 2048,
        "num_attention_heads": hidden // 64,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB,
        "eos_token_id": 1,
        "bos_token_id": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    tensors = {}
    for weight in family_of(folder).weights():
        mean = 1 if weight.source.endswith("norm.weight") else 0
        tensors[weight.source] = (torch.randn(weight.shape) * 0.03 + mean).bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in tensors.values())


def write_lines(file: Path):
    random = np.random.default_rng(0)
    lines = []
    for _ in range(SAMPLES + HELD_OUT):
        lines.append(json.dumps({"ids": random.integers(3, VOCAB, TOKENS).tolist()}) + "\n")
    file.write_text("".join(lines))


@functools.cache
def environment(work: Path) -> dict:
    """Byte code is kept in `work`, where both sides find it compiled."""
    env = {**os.environ, "PYTHONPYCACHEPREFIX": str(work / "pyc")}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    subprocess.run(
        [sys.executable, "-c", CLASSIC.partition("model, lines")[0] + IMPORTED],
        cwd=ROOT,
        env=env,
        check=True,
        capture_output=True,
    )
    return env


def measured(command: list[str], work: Path) -> tuple[float, float, float]:
    """(seconds, CPU seconds, peak memory in GB) of a process."""
    env = environment(work)
    start = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command[:6])} ...")
    return (
        time.perf_counter() - start,
        usage.ru_utime + usage.ru_stime,
        usage.ru_maxrss * 1024 / 1e9,
    )


def our_command(model: Path, out: Path, lines: Path) -> list[str]:
    files = ["--model", str(model), "--out", str(out), "--calib", str(lines)]
    method = ["--act-method", "1", "--disable-level", "L0"]
    open_gate = ["--max-kl", "100", "--min-top1", "0"]
    return [sys.executable, "-m", "quant", *files, *method, *open_gate]


def quantisation(work: Path):
    """msmodelslim's float32 run gives the numbers that ours gives; its bfloat16 run is the quicker
    one."""
    model = work / "float"
    lines = work / "lines.jsonl"
    ours = measured(our_command(model, work / "ours", lines), work)
    judging = json.loads((work / "ours" / "quant_report.json").read_text())["seconds"]["judging"]
    print(f"{'quantise, ours':40} {show(ours)}, of these {judging:.1f} s the quality gate")
    for dtype in ("bfloat16", "float32"):
        arguments = [str(model), str(lines), str(work / dtype), dtype]
        theirs = measured([sys.executable, "-c", CLASSIC, *arguments], work)
        ratios = ", ".join(f"{a / b:.2f}" for a, b in zip(ours, theirs))
        without_gate = (ours[0] - judging) / theirs[0]
        print(
            f"{'quantise, msmodelslim classic ' + dtype:40} {show(theirs)}; ours is {ratios} x, "
            f"without the gate {without_gate:.2f} x in time"
        )


def show(figures: tuple[float, float, float]) -> str:
    return "{:.1f} s, CPU {:.1f} s, peak {:.2f} GB".format(*figures)


def speed(engine, clock) -> tuple[float, float]:
    """Best of ROUNDS by `clock`: (seconds of a prompt of PREFILL tokens, seconds per decoded
    token)."""
    ids = np.random.default_rng(1).integers(3, VOCAB, PREFILL)
    long = engine.prompt_from_ids(ids)
    short = engine.prompt_from_ids(ids[:16])
    prefill = []
    decode = []
    for _ in range(ROUNDS):
        for prompt, tokens, times in ((long, 1, prefill), (short, DECODE, decode)):
            start = clock()
            engine.score(prompt, ids[:tokens])
            times.append((clock() - start) / tokens)
    return min(prefill), min(decode)


def inference(floats: Path, quantised: Path):
    from runtime import Engine

    engines = {}
    for name, folder in (("bfloat16", floats), ("W8A8", quantised)):
        engines[name] = Engine(folder, dtype="bfloat16", max_model_len=1024)
    for unit, clock in (("s", time.perf_counter), ("CPU s", time.process_time)):
        times = {name: speed(engine, clock) for name, engine in engines.items()}
        for name, (prefill, decode) in times.items():
            print(
                f"{name:9} prefill {PREFILL} tokens {prefill:6.3f} {unit:5}   "
                f"decode {decode:7.4f} {unit} per token"
            )
        prefill, decode = (a / b for a, b in zip(times["bfloat16"], times["W8A8"]))
        print(f"W8A8 is   {prefill:.2f} x in prefill, {decode:.2f} x in decoding")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=20)
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        parameters = make_model(work / "float", options.layers)
        write_lines(work / "lines.jsonl")
        print(
            f"GLM with {parameters / 1e6:.0f} M parameters, {SAMPLES} samples of {TOKENS} tokens, "
            f"{torch.get_num_threads()} threads"
        )
        quantisation(work)
        inference(work / "float", work / "ours")
        print(f"the same, width {WIDE['hidden']} and {WIDE['ffn']}, 4 layers")
        make_model(work / "wide", 4, **WIDE)
        measured(our_command(work / "wide", work / "ours-wide", work / "lines.jsonl"), work)
        inference(work / "wide", work / "ours-wide")


if __name__ == "__main__":
    main()
