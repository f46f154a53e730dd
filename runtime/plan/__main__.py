"""`python -m runtime.plan`: what a model needs in memory on an Ascend chip, and roughly how fast it will be.

A config.json flows in (weights are not needed); bytes per device, whether they fit, and estimated times flow out. `Engine`
makes the same plan, prints it and checks it before anything is loaded.
"""
from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from runtime.common.errors import CHECK_FAILED, ToolkitError, run_command
from runtime.common.flags import Parser, check_folder, dtype_name, flag, require

from .roofline import CHIPS, COLLECTIVE_BUFFERS, KERNEL_WORKSPACE, VISION_WORKSPACE, Chip, Roofline

if TYPE_CHECKING:       # `--help` does without torch
    import torch

    from models.family import Family

SEQUENCES = 8           # decoded together when --max-num-seqs is not given
MOST_TOKENS = 8192      # longest sequence when --max-model-len is not given, whatever the model could
SMALL = 2 << 30         # decoders up to this many fp32 bytes run in float32 on the CPU; larger ones in bfloat16
VISION_BYTES = {"fp32": 4, "bf16": 2, "int8": 1}        # per weight of the encoder on the CPU
RELEASED = Path(__file__).parents[2] / "models" / "released"


@dataclass(frozen=True)
class Plan:
    """Bytes on each of `devices`; on the first, which has most. workspace is counted on NPUs. wanted_tokens: what the
    cache would hold if there were memory for it."""
    weights: int
    cache: int
    dtype: torch.dtype
    cache_tokens: int
    devices: int = 1
    vision: int = 0
    workspace: int = 0
    wanted_tokens: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.vision + self.workspace

    def describe(self) -> str:
        more = {"vision": self.vision, "workspace": self.workspace}
        text = "".join(f" + {name} {gib(size)}" for name, size in more.items() if size)
        where = f" on each of {self.devices} devices" if self.devices > 1 else ""
        cut = f" of the {self.wanted_tokens}" if self.wanted_tokens > self.cache_tokens else ""
        return (f"memory: weights {gib(self.weights)} + cache {gib(self.cache)} for {self.cache_tokens}{cut} tokens{text} = "
                f"{gib(self.total)} GiB{where}")


def longest_of(family, asked: int | None) -> int:
    """Tokens of the longest sequence when --max-model-len is `asked`."""
    most = family.decoder.max_length
    if asked is not None and asked > most:
        raise ToolkitError(f"--max-model-len {asked} is more than the {most} tokens of {family.name}; lower it")
    return min(most, MOST_TOKENS) if asked is None else asked


def gib(size: int) -> str:
    return f"{size / 2**30:.2f}"


def choose_dtype(name: str, family) -> torch.dtype:
    import torch
    if name != "auto":
        return getattr(torch, name)
    return torch.float32 if 4 * decoder_parameters(family) <= SMALL else torch.bfloat16


def decoder_parameters(family, split=None) -> int:
    """Values in memory, of the whole decoder or on the first device of `split`; a matrix that serves as embedding and as
    output head is held twice."""
    from runtime.parallel.split import Split
    split = split or Split(family.decoder)
    return int(sum(math.prod(w.shape) * split.share(part.target) for w in family.weights() for part in w.parts
                   if not part.target.startswith("vision.")))


def decoder_bytes(family, dtype: torch.dtype, split, cpu_weights: str = "float", one_layer: bool = False) -> int:
    """Of the directory's decoder weights on the first device of `split`, as --cpu-weights packs them; of its layers one or
    all. Scales are counted where they are stored, and for int4."""
    from models.checkpoint.quantized import stored_weights

    def share(target):
        return split.share(target) / (family.decoder.layers if one_layer and target.startswith("layers.") else 1)
    return int(sum(math.prod(w.shape) * share(p.target) * _bits(p.target, dtype, cpu_weights) / 8
                   for w in stored_weights(family) for p in w.parts if not p.target.startswith("vision.")))


def _bits(target: str, dtype: torch.dtype, cpu_weights: str) -> float:
    """int8 stays int8, except in W8A16 layers."""
    from models.checkpoint.quantized import PIECE
    from runtime.engine.cpu_weights import bits
    piece = PIECE.fullmatch(target)
    if piece and piece[3] not in ("FLOAT", "W8A16"):
        return 8 if piece[4] == "weight" else 32
    return bits(target, cpu_weights, dtype)


def vision_parameters(family) -> int:
    return sum(math.prod(w.shape) for w in family.weights() if w.parts and w.parts[0].target.startswith("vision."))


def make_plan(family, dtype_name: str, cache_tokens: int, devices: int = 1, cpu_weights: str = "float",
              one_layer: bool = False) -> Plan:
    """The decoder's weights and cache, split over `devices`."""
    from runtime.engine.kv_cache import KVCache
    from runtime.parallel.split import Split
    dtype, split = choose_dtype(dtype_name, family), Split(family.decoder, devices)
    cache = KVCache.bytes_per_token(split.config, dtype) * cache_tokens
    return Plan(decoder_bytes(family, dtype, split, cpu_weights, one_layer), cache, dtype, cache_tokens, devices)


def on_npu(plan: Plan, family, longest: int, vision: bool = True) -> Plan:
    """`plan` with what an NPU holds besides: the `vision` encoder, in half precision, and memory to compute prompts of up
    to `longest` tokens."""
    from runtime.parallel.split import Split
    c = Split(family.decoder, plan.devices).config
    width = 4 * c.hidden + (c.heads + 2 * c.kv_heads) * c.head_dim + 3 * c.ffn      # rows alive at once in a layer
    workspace = longest * width * plan.dtype.itemsize + KERNEL_WORKSPACE + (plan.devices > 1) * COLLECTIVE_BUFFERS
    encoder = vision * int(2 * vision_parameters(family) * (1 + VISION_WORKSPACE))
    return replace(plan, vision=encoder, workspace=workspace)


def plan_engine(family, dtype: str, longest: int, options, free: int | None) -> Plan:
    """What an Engine takes: a cache for --max-num-seqs sequences of `longest` tokens, or for as much of them as
    --memory-utilization of the `free` bytes leaves room for, and the vision encoder if the model has one.

    ToolkitError when not even one sequence fits. free None: not checked.
    """
    wanted = options.cache_tokens or max(longest, (options.max_num_seqs or SEQUENCES) * longest)
    plan = make_plan(family, dtype, wanted, options.tensor_parallel_size, options.cpu_weights, options.layer_by_layer)
    if options.device == "cpu":
        encoder = VISION_BYTES[options.vision_precision] * vision_parameters(family)
        plan = replace(plan, vision=encoder * (options.vision != "om"))
    else:
        plan = on_npu(plan, family, longest, vision="npu" in options.device and options.vision in ("auto", "om"))
    if free is None:
        return plan
    each = plan.cache // wanted
    room = int(free * options.memory_utilization - (plan.total - plan.cache)) // each
    if room < (options.cache_tokens or longest):
        refuse(plan, free, options, room)
    return replace(plan, cache=min(room, wanted) * each, cache_tokens=min(room, wanted), wanted_tokens=wanted)


def refuse(plan: Plan, free: int, options, room: int):
    """ToolkitError that says what fits: `room` tokens in the cache, or none."""
    smaller = {"cpu": "--dtype bfloat16, --cpu-weights int8 or int4,", "cuda": "--dtype float16"}.get(
        options.device.split(":")[0], "--tensor-parallel-size 2")
    advice = (f"the most that fits is one sequence of {room} tokens: --max-num-seqs 1 --max-model-len {room}" if room > 0
              else f"weights and encoder alone do not fit: use {smaller} or a machine with more memory")
    raise ToolkitError(f"{plan.describe()}, but only {gib(free)} GiB are free, of which --memory-utilization "
                       f"{options.memory_utilization:g} may be taken; {advice}")


def available_memory() -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:
        fields = dict(line.split(":", 1) for line in lines)
    return int(fields["MemAvailable"].split()[0]) * 1024


# the command

@dataclass(kw_only=True)
class PlanOptions:
    model: str = flag("checkpoint folder, of which config.json is enough, or the name of a release, e.g. visualglm-6b",
                      "-m", "--model-path", metavar="DIR")
    soc: str = flag(f"chip: {', '.join(CHIPS)}", "--soc-version", default="Ascend910B3", metavar="SOC")
    tensor_parallel_size: int = flag("devices the decoder is split over: 1, 2, 4 or 8", "-tp", "--tp", default=1, kind=int,
                                     metavar="N")
    batch: int = flag("sequences at the same time", "--batch-size", default=8, kind=int, metavar="N")
    max_model_len: int | None = flag("longest prompt + answer in tokens (default: what the model can, at most 8192)",
                                     default=None, kind=int, metavar="N")
    input_len: int | None = flag("tokens of the prompt whose first token is timed (default: half of --max-model-len)",
                                 default=None, kind=int, metavar="N")
    dtype: str = flag("weights and arithmetic: auto (as released, where the chip has it), bfloat16 (bf16), float16 (fp16)",
                      default="auto", metavar="DTYPE")
    json: bool = flag("print JSON, in bytes and milliseconds", default=False, kind=bool)

    def __post_init__(self):
        self.soc = next((name for name in CHIPS if self.soc.lower() in (name.lower(), name[6:].lower())), self.soc)
        self.dtype = dtype_name(self.dtype)
        require(self, "soc", self.soc in CHIPS, f"use one of {', '.join(CHIPS)} (npu-smi info shows yours)")
        require(self, "tensor_parallel_size", self.tensor_parallel_size in (1, 2, 4, 8), "use 1, 2, 4 or 8")
        for name in ("batch", "max_model_len", "input_len"):
            require(self, name, getattr(self, name) is None or getattr(self, name) >= 1, "1 or more is needed")


def parser() -> Parser:
    return Parser("python -m runtime.plan", "--model DIR [--soc SOC] [--tp N] [options]",
                  "Memory per device and estimated speed of a model on Ascend chips, from its config.json alone. Exit code "
                  "0: it fits, 1: it does not. The times are estimates, not measurements: see docs/plan.md.",
                  {"options": PlanOptions})


def main(argv) -> int:
    (options,) = parser().parse(argv)
    found = estimate(find_family(options.model), options)
    print(json.dumps(found, indent=2) if options.json else describe(found))
    return 0 if found["fits"] else CHECK_FAILED


def find_family(model: str) -> Family:
    """The family of a folder's config.json, or of the release of that name."""
    from models import family_of
    release = RELEASED / f"{model}.json"
    if Path(model).exists() or not release.is_file():
        known = ", ".join(sorted(p.stem for p in RELEASED.glob("*.json")))
        if not Path(model).exists():
            raise ToolkitError(f"--model {model} is neither a folder nor a release; known releases: {known}")
        check_folder("model", model)
        return family_of(model)
    with TemporaryDirectory() as folder:
        config = json.loads(release.read_text(encoding="utf-8"))["config"]
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return family_of(folder)


def estimate(family: Family, options: PlanOptions) -> dict:
    """Bytes per device and milliseconds. ToolkitError for what the model or the chip cannot do."""
    from runtime.ops.npu.ops import NpuOps
    from runtime.parallel.split import check_split
    chip, devices, longest = CHIPS[options.soc], options.tensor_parallel_size, longest_of(family, options.max_model_len)
    check_split(family, devices)
    ops = NpuOps(chip.soc, "cpu")
    dtype = ops.default_dtype(family) if options.dtype == "auto" else options.dtype
    ops.check(dtype, ops.default_block_size)
    plan = on_npu(make_plan(family, dtype, options.batch * longest, devices), family, longest)
    used = plan.total + chip.idle
    return {"model": family.name, "soc": chip.name, "devices": devices, "dtype": dtype, "batch": options.batch,
            "max_model_len": longest,
            "bytes": {"weights": plan.weights, "cache": plan.cache, "vision": plan.vision, "workspace": plan.workspace,
                      "in_use_when_idle": chip.idle, "total": used, "device": chip.memory},
            "fits": used <= chip.memory, **times(family, plan, chip, options, longest)}


def times(family, plan: Plan, chip: Chip, options: PlanOptions, longest: int) -> dict:
    """Estimated milliseconds; tokens are timed half-way between the prompt's end and the longest sequence."""
    prompt = options.input_len or -(-longest // 2)
    if prompt > longest:
        raise ToolkitError(f"--input-len {prompt} is more than --max-model-len {longest}; lower it")
    length, roofline = (prompt + longest) // 2, roofline_of(family, plan, chip)
    first, host = roofline.prompt(prompt, family.prefix_lm), roofline.host_bound_prompt(family.prefix_lm)
    return {"input_len": prompt, "first_token_ms": round(first * 1e3, 2), "first_token_host_bound_ms": round(host * 1e3, 2),
            "token_ms": round(roofline.token(1, length) * 1e3, 2),
            "batch_token_ms": round(roofline.token(options.batch, length) * 1e3, 2)}


def roofline_of(family, plan: Plan, chip: Chip) -> Roofline:
    from runtime.parallel.split import Split
    embedding = family.decoder.vocab_size * family.decoder.hidden * plan.dtype.itemsize     # read row by row
    return Roofline(chip, Split(family.decoder, plan.devices), plan.weights - embedding, plan.dtype.itemsize)


def describe(found: dict) -> str:
    size, total = found["bytes"], found["bytes"]["total"]
    rows = [f"  {name.replace('_', ' '):<18}{gib(size[name]):>7}" for name in (*size,)[:-2]]
    verdict = "fits" if found["fits"] else "DOES NOT FIT: use more devices, a smaller --batch or a smaller --max-model-len"
    first = f"  first token of a {found['input_len']}-token prompt: {found['first_token_ms']:.0f} ms"
    if found["first_token_host_bound_ms"] > found["first_token_ms"]:
        first += f", up to {found['first_token_host_bound_ms']:.0f} ms where the host launches kernels slowly"
    speed = found["batch"] * 1000 / found["batch_token_ms"]
    return "\n".join([
        f"{found['model']} on {found['devices']} x {found['soc']}, {found['dtype']}, {found['batch']} sequences of "
        f"{found['max_model_len']} tokens", "GiB per device:", *rows,
        f"  {'total':<18}{gib(total):>7} of {gib(size['device'])}: {verdict}", "estimated, not measured:", first,
        f"  per token: {found['token_ms']:.1f} ms alone, {found['batch_token_ms']:.1f} ms for {found['batch']} together "
        f"({speed:.0f} tokens/s)"])


if __name__ == "__main__":
    sys.exit(run_command(main))
