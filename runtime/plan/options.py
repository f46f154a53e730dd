"""Options of `runtime.plan`."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.ascend.chips import CHIPS
from runtime.common.flags import flag, require
from runtime.common.shared_flags import (
    check_tensor_parallel_size,
    max_model_len_flag,
    model_flag,
    tensor_parallel_flag,
)
from runtime.engine.options import dtype_name


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
        self.soc = _full_name(self.soc)
        self.dtype = dtype_name(self.dtype)
        require(
            self,
            "soc",
            self.soc in CHIPS,
            f"use one of {', '.join(CHIPS)} (npu-smi info shows yours)",
        )
        check_tensor_parallel_size(self)
        for name in ("batch", "max_model_len", "input_len"):
            value = getattr(self, name)
            require(self, name, value is None or value >= 1, "1 or more is needed")


def _full_name(soc: str) -> str:
    """ "910b3" -> "Ascend910B3"; a name that no chip has unchanged."""
    for name in CHIPS:
        if soc.lower() in (name.lower(), name.removeprefix("Ascend").lower()):
            return name
    return soc
