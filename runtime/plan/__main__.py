"""`python -m runtime.plan`: what a model needs in memory on an Ascend chip, and roughly how fast it will be.

A config.json flows in (weights are not needed); bytes per device, whether they fit, and estimated times flow out. `Engine`
makes the same plan, prints it and checks it before anything is loaded.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from runtime.ascend.chips import CHIPS, Chip
from runtime.common.errors import CHECK_FAILED, ToolkitError, run_command
from runtime.common.flags import Parser, check_folder, flag, require
from runtime.common.machine import gib
from runtime.common.shared_flags import (
    check_tensor_parallel_size,
    max_model_len_flag,
    model_flag,
    tensor_parallel_flag,
)
from runtime.engine.loading.memory import Plan, make_plan, max_model_len_for, on_npu
from runtime.engine.options import dtype_name

from .roofline import Roofline

if TYPE_CHECKING:  # `--help` does without torch
    from models.family import Family

RELEASED = Path(__file__).parents[2] / "models" / "released"


# the command


@dataclass(kw_only=True)
class PlanOptions:
    model: str = model_flag(
        "checkpoint folder, of which config.json is enough, or the name of a release, e.g. visualglm-6b"
    )
    soc: str = flag(
        f"chip: {', '.join(CHIPS)}", "--soc-version", default="Ascend910B3", metavar="SOC"
    )
    tensor_parallel_size: int = tensor_parallel_flag(
        "devices the decoder is split over: 1, 2, 4 or 8"
    )
    batch: int = flag(
        "sequences at the same time", "--batch-size", default=8, kind=int, metavar="N"
    )
    max_model_len: int | None = max_model_len_flag()
    input_len: int | None = flag(
        "tokens of the prompt whose first token is timed (default: half of --max-model-len)",
        default=None,
        kind=int,
        metavar="N",
    )
    dtype: str = flag(
        "weights and arithmetic: auto (as released, where the chip has it), bfloat16 (bf16), float16 (fp16)",
        default="auto",
        metavar="DTYPE",
    )
    json: bool = flag("print JSON, in bytes and milliseconds", default=False, kind=bool)

    def __post_init__(self):
        self.soc = next(
            (name for name in CHIPS if self.soc.lower() in (name.lower(), name[6:].lower())),
            self.soc,
        )
        self.dtype = dtype_name(self.dtype)
        require(
            self,
            "soc",
            self.soc in CHIPS,
            f"use one of {', '.join(CHIPS)} (npu-smi info shows yours)",
        )
        check_tensor_parallel_size(self)
        for name in ("batch", "max_model_len", "input_len"):
            require(
                self,
                name,
                getattr(self, name) is None or getattr(self, name) >= 1,
                "1 or more is needed",
            )


def parser() -> Parser:
    return Parser(
        "python -m runtime.plan",
        "--model DIR [--soc SOC] [--tp N] [options]",
        "Memory per device and estimated speed of a model on Ascend chips, from its config.json alone. Exit code "
        "0: it fits, 1: it does not. The times are estimates, not measurements: see docs/plan.md.",
        {"options": PlanOptions},
    )


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
            raise ToolkitError(
                f"--model {model} is neither a folder nor a release; known releases: {known}"
            )
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

    chip = CHIPS[options.soc]
    devices = options.tensor_parallel_size
    longest = max_model_len_for(family, options.max_model_len)
    check_split(family, devices)
    ops = NpuOps(chip.soc, "cpu")
    dtype = ops.default_dtype(family) if options.dtype == "auto" else options.dtype
    ops.check(dtype, ops.default_block_size)
    plan = on_npu(make_plan(family, dtype, options.batch * longest, devices), family, longest)
    used = plan.total + chip.idle
    return {
        "model": family.name,
        "soc": chip.name,
        "devices": devices,
        "dtype": dtype,
        "batch": options.batch,
        "max_model_len": longest,
        "bytes": {
            "weights": plan.weights,
            "cache": plan.cache,
            "vision": plan.vision,
            "workspace": plan.workspace,
            "in_use_when_idle": chip.idle,
            "total": used,
            "device": chip.memory,
        },
        "fits": used <= chip.memory,
        **times(family, plan, chip, options, longest),
    }


def times(family, plan: Plan, chip: Chip, options: PlanOptions, longest: int) -> dict:
    """Estimated milliseconds; tokens are timed half-way between the prompt's end and the longest sequence."""
    prompt = options.input_len or -(-longest // 2)
    if prompt > longest:
        raise ToolkitError(f"--input-len {prompt} is more than --max-model-len {longest}; lower it")
    length = (prompt + longest) // 2
    roofline = roofline_of(family, plan, chip)
    first = roofline.prompt(prompt, family.prefix_lm)
    host = roofline.host_bound_prompt(family.prefix_lm)
    return {
        "input_len": prompt,
        "first_token_ms": round(first * 1e3, 2),
        "first_token_host_bound_ms": round(host * 1e3, 2),
        "token_ms": round(roofline.token(1, length) * 1e3, 2),
        "batch_token_ms": round(roofline.token(options.batch, length) * 1e3, 2),
    }


def roofline_of(family, plan: Plan, chip: Chip) -> Roofline:
    from runtime.parallel.split import Split

    embedding = (
        family.decoder.vocab_size * family.decoder.hidden * plan.dtype.itemsize
    )  # read row by row
    return Roofline(
        chip, Split(family.decoder, plan.devices), plan.weights - embedding, plan.dtype.itemsize
    )


def describe(found: dict) -> str:
    size = found["bytes"]
    total = found["bytes"]["total"]
    rows = [f"  {name.replace('_', ' '):<18}{gib(size[name]):>7}" for name in (*size,)[:-2]]
    verdict = (
        "fits"
        if found["fits"]
        else "DOES NOT FIT: use more devices, a smaller --batch or a smaller --max-model-len"
    )
    first = (
        f"  first token of a {found['input_len']}-token prompt: {found['first_token_ms']:.0f} ms"
    )
    if found["first_token_host_bound_ms"] > found["first_token_ms"]:
        first += f", up to {found['first_token_host_bound_ms']:.0f} ms where the host launches kernels slowly"
    speed = found["batch"] * 1000 / found["batch_token_ms"]
    return "\n".join(
        [
            f"{found['model']} on {found['devices']} x {found['soc']}, {found['dtype']}, {found['batch']} sequences of "
            f"{found['max_model_len']} tokens",
            "GiB per device:",
            *rows,
            f"  {'total':<18}{gib(total):>7} of {gib(size['device'])}: {verdict}",
            "estimated, not measured:",
            first,
            f"  per token: {found['token_ms']:.1f} ms alone, {found['batch_token_ms']:.1f} ms for {found['batch']} together "
            f"({speed:.0f} tokens/s)",
        ]
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
