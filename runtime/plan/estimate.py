"""What a model needs on an Ascend chip.

Takes the options of `runtime.plan` and a model's family, returns bytes per device and milliseconds.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from models import RELEASED, family_of
from models.family import Family
from runtime.ascend.chips import CHIPS, Chip
from runtime.common.errors import ToolkitError
from runtime.common.flags import check_folder
from runtime.engine.loading.memory import Plan, make_plan, max_model_len_for, on_npu
from runtime.ops.npu.ops import NpuOps
from runtime.parallel.split import Split, check_split

from .options import PlanOptions
from .roofline import Roofline


def find_family(model: str) -> Family:
    """The family of a folder's config.json, or of the release of that name."""
    release = RELEASED / f"{model}.json"
    if release.is_file() and not Path(model).exists():
        with TemporaryDirectory() as folder:
            config = json.loads(release.read_text(encoding="utf-8"))["config"]
            (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
            return family_of(folder)
    if not Path(model).exists():
        known = ", ".join(sorted(path.stem for path in RELEASED.glob("*.json")))
        raise ToolkitError(
            f"--model {model} is neither a folder nor a release; known releases: {known}"
        )
    check_folder("model", model)
    return family_of(model)


def estimate(family: Family, options: PlanOptions) -> dict:
    """Bytes per device and milliseconds. ToolkitError for what the model or the chip cannot do."""
    chip = CHIPS[options.soc]
    devices = options.tensor_parallel_size
    max_model_len = max_model_len_for(family, options.max_model_len)
    check_split(family, devices)
    dtype = _choose_dtype(family, chip, options.dtype)
    plan = make_plan(family, dtype, options.batch * max_model_len, devices)
    plan = on_npu(plan, family, max_model_len)
    used = plan.total + chip.idle
    return {
        "model": family.name,
        "soc": chip.name,
        "devices": devices,
        "dtype": dtype,
        "batch": options.batch,
        "max_model_len": max_model_len,
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
        **_times(roofline_of(family, plan, chip), family.prefix_lm, options, max_model_len),
    }


def _choose_dtype(family: Family, chip: Chip, asked: str) -> str:
    """ToolkitError where the chip does not have it."""
    ops = NpuOps(chip.soc, "cpu")
    dtype = ops.default_dtype(family) if asked == "auto" else asked
    ops.check(dtype)
    return dtype


def _times(
    roofline: Roofline, bidirectional: bool, options: PlanOptions, max_model_len: int
) -> dict:
    """Milliseconds; tokens are timed half-way between the prompt's end and the longest sequence."""
    prompt = options.input_len or -(-max_model_len // 2)
    if prompt > max_model_len:
        raise ToolkitError(
            f"--input-len {prompt} is more than --max-model-len {max_model_len}; lower it"
        )
    cached = (prompt + max_model_len) // 2
    return {
        "input_len": prompt,
        "first_token_ms": _milliseconds(roofline.prompt(prompt, bidirectional)),
        "first_token_host_bound_ms": _milliseconds(roofline.host_bound_prompt(bidirectional)),
        "token_ms": _milliseconds(roofline.token(1, cached)),
        "batch_token_ms": _milliseconds(roofline.token(options.batch, cached)),
    }


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1e3, 2)


def roofline_of(family: Family, plan: Plan, chip: Chip) -> Roofline:
    """Times of the planned model; of its embedding, which is read row by row, no bytes count."""
    decoder = family.decoder
    itemsize = plan.dtype.itemsize
    embedding = decoder.vocab_size * decoder.hidden * itemsize
    return Roofline(chip, Split(decoder, plan.devices), plan.weights - embedding, itemsize)
