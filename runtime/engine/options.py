"""Options of the engine and of sampling: each field is a flag of the commands and an argument of the Python API."""

import math
import re
from dataclasses import dataclass, replace

from runtime.common.errors import ToolkitError
from runtime.common.flags import check_choices, check_folder, flag, require
from runtime.common.shared_flags import (
    check_tensor_parallel_size,
    language_flag,
    max_model_len_flag,
    model_flag,
    tensor_parallel_flag,
)

DTYPES = {
    "auto": "auto",
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
}


def dtype_name(spelling: str) -> str:
    """ "fp16", "half", "float16" -> "float16", and so on."""
    if spelling not in DTYPES:
        raise ToolkitError(f"--dtype is {spelling!r}: use one of {', '.join(DTYPES)}")
    return DTYPES[spelling]


def npu(index: str) -> str:
    """--device-id N -> device name."""
    return f"npu:{int(index)}"


@dataclass(kw_only=True)
class InputOptions:
    """What every command that runs a model is told: which model, which pictures, which prompt wording."""

    model: str = model_flag()
    image: tuple[str, ...] = flag(
        "picture, or pictures where the model takes several",
        "--input-image",
        default=(),
        metavar="FILE",
        many=True,
    )
    language: str | None = language_flag()

    def __post_init__(self):
        self.image = tuple(self.image)
        check_choices(self)
        check_folder("model", self.model)


@dataclass
class EngineOptions:
    """Where and how a model runs; Engine(model_dir, **these). ToolkitError for a value that cannot be."""

    device: str = flag(
        "where the decoder runs: cpu, npu, npu:N, cuda or cuda:N",
        default="cpu",
        metavar="DEVICE",
        shorthand=("--device-id", npu, "N", "the same as --device npu:N"),
    )
    dtype: str = flag(
        "weights and arithmetic of the decoder: auto, float32 (fp32), bfloat16 (bf16), float16 (fp16)",
        default="auto",
        metavar="DTYPE",
    )
    vision: str = flag(
        "what runs the vision encoder", default="auto", choices=("auto", "onnx", "torch", "om")
    )
    vision_precision: str = flag(
        "CPU: products of the vision encoder; bf16 and int8 run in torch and are checked against "
        "fp32 first",
        default="fp32",
        choices=("fp32", "bf16", "int8"),
    )
    artifact: str | None = flag(
        "folder written by `python -m convert`, or an .om file; without it the model is looked up "
        "in the cache and converted once",
        default=None,
        metavar="PATH",
    )
    ops: str = flag(
        "decoder operators: reference is plain torch, the yardstick of the others",
        default="auto",
        choices=("auto", "reference", "cpu"),
    )
    cpu_weights: str = flag(
        "CPU: pack the decoder's linear layers to 8 or 4 bits, once; less memory, faster, not exact",
        default="float",
        choices=("float", "int8", "int4"),
    )
    keep_dtype: tuple[str, ...] = flag(
        "CPU: keep the linear layers of a stage in float32, e.g. layers.1.mlp or "
        "layers.*.attention, whatever --dtype is; may be repeated",
        default=(),
        metavar="STAGE",
        many=True,
    )
    max_model_len: int | None = max_model_len_flag()
    max_num_seqs: int | None = flag(
        "sequences decoded together (default: 8; 1 in commands that answer one question at a time)",
        default=None,
        kind=int,
        metavar="N",
    )
    max_num_batched_tokens: int = flag(
        "tokens computed in one step; a longer prompt is computed in pieces, between which "
        "other answers go on",
        default=2048,
        kind=int,
        metavar="N",
    )
    memory_utilization: float = flag(
        "share of the free memory that weights, cache and vision encoder may take",
        "--gpu-memory-utilization",
        default=0.9,
        kind=float,
        metavar="SHARE",
    )
    block_size: int | None = flag(
        "tokens per block of the KV cache (default: 16 on the CPU, 128 on an NPU)",
        default=None,
        kind=int,
        metavar="N",
    )
    tensor_parallel_size: int = tensor_parallel_flag(
        "devices the decoder is split over: 1, 2, 4 or 8; started here, or by torchrun"
    )
    enforce_eager: bool = flag(
        "NPU, GPU: run every decode step kernel by kernel instead of replaying recorded graphs",
        default=False,
        kind=bool,
    )
    cache_tokens: int | None = (
        None  # tokens the KV cache holds; None = as many as sequences and memory allow
    )
    layer_by_layer: bool = False  # one layer's weights in memory at a time; only for `score`

    def __post_init__(self):
        self.device = {"npu": "npu:0", "cuda": "cuda:0"}.get(self.device, self.device)
        self.dtype = dtype_name(self.dtype)
        check_choices(self)
        require(
            self,
            "device",
            bool(re.fullmatch(r"cpu|(npu|cuda):\d+", self.device)),
            "use cpu, npu, npu:N, cuda or cuda:N",
        )
        require(
            self,
            "cpu_weights",
            self.cpu_weights == "float" or (self.device == "cpu" and self.ops != "reference"),
            "it needs --device cpu, and --ops auto or cpu",
        )
        self.keep_dtype = tuple(self.keep_dtype)
        plain = (
            self.device == "cpu" and self.cpu_weights == "float" and self.tensor_parallel_size == 1
        )
        require(
            self,
            "keep_dtype",
            not self.keep_dtype or plain,
            "it needs --device cpu, --cpu-weights float and one process",
        )
        require(
            self,
            "layer_by_layer",
            not self.layer_by_layer or plain and not self.keep_dtype,
            "it needs --device cpu, --cpu-weights float and one process, and no --keep-dtype",
        )
        require(
            self,
            "vision_precision",
            self.vision_precision == "fp32" or self.vision in ("auto", "torch"),
            f"--vision {self.vision} runs what was converted; use --vision torch",
        )
        require(
            self,
            "block_size",
            self.block_size is None or self.block_size >= 1,
            "1 or more is needed, e.g. 16",
        )
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            require(
                self,
                name,
                getattr(self, name) is None or getattr(self, name) >= 1,
                "1 or more is needed, e.g. 8",
            )
        require(
            self,
            "memory_utilization",
            0 < self.memory_utilization <= 1,
            "above 0 and up to 1 is needed, e.g. 0.9",
        )
        require(
            self,
            "max_model_len",
            self.max_model_len is None or self.max_model_len >= 1,
            "1 or more is needed, e.g. 2048",
        )
        check_tensor_parallel_size(self)
        require(
            self,
            "tensor_parallel_size",
            self.tensor_parallel_size == 1 or "cuda" not in self.device,
            "a decoder runs on one GPU; use 1",
        )


def one_at_a_time(options: EngineOptions) -> EngineOptions:
    """For a command that answers one question after another: no cache for more, unless the user says so."""
    return replace(options, max_num_seqs=options.max_num_seqs or 1)


@dataclass
class SamplingParams:
    """How one answer is sampled; None = the default of the model's release. ToolkitError for a value that cannot be."""

    max_tokens: int | None = flag(
        "longest answer in tokens (default: up to the model's length limit)",
        default=None,
        kind=int,
        metavar="N",
    )
    temperature: float | None = flag(
        "0 always takes the most likely token (default: as released)",
        "--temp",
        default=None,
        kind=float,
        metavar="T",
    )
    top_p: float | None = flag(
        "keep the smallest set of tokens of this probability (default: as released)",
        default=None,
        kind=float,
        metavar="P",
    )
    top_k: int | None = flag(
        "keep the K most likely tokens, 0 = all (default: as released)",
        default=None,
        kind=int,
        metavar="K",
    )
    repetition_penalty: float | None = flag(
        "above 1 discourages tokens already seen (default: as released)",
        default=None,
        kind=float,
        metavar="R",
    )
    seed: int | None = flag(
        "makes sampled answers repeatable (default: another answer every time)",
        default=None,
        kind=int,
        metavar="N",
    )
    min_p: float = 0.0  # drop tokens less likely than this share of the likeliest one's probability
    presence_penalty: float = 0.0  # taken from the logits of tokens that the answer has
    frequency_penalty: float = 0.0  # the same, for every time that the answer has them
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[
        int, ...
    ] = ()  # end the answer and are no part of it, also with ignore_eos
    logprobs: int | None = (
        None  # of how many of the likeliest tokens Result.logprobs tells, besides the chosen one
    )

    def __post_init__(self):
        self.stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        self._check("max_tokens", lambda n: n >= 1, "1 or more is needed, e.g. 256")
        self._check(
            "temperature",
            lambda t: 0 <= t < math.inf,
            "0 or more is needed; 0 takes the most likely token",
        )
        self._check(
            "top_p",
            lambda p: 0 < p <= 1,
            "above 0 and up to 1 is needed; to take the most likely token give --temperature 0",
        )
        self._check("top_k", lambda k: k >= 0, "0 or more is needed; 0 keeps all tokens")
        self._check(
            "repetition_penalty",
            lambda r: 0.01 <= r <= 100,
            "0.01 to 100 is needed; 1 switches it off",
        )
        self.stop_token_ids = tuple(self.stop_token_ids)
        self._check("min_p", lambda p: 0 <= p <= 1, "0 to 1 is needed; 0 keeps all tokens")
        for name in ("presence_penalty", "frequency_penalty"):
            self._check(name, lambda p: -2 <= p <= 2, "-2 to 2 is needed; 0 switches it off")
        self._check("logprobs", lambda n: n >= 0, "0 or more is needed")
        self._check("seed", lambda n: 0 <= n < 2**63, "use a whole number from 0 up, below 2^63")

    def _check(self, name, fits, rule):
        value = getattr(self, name)
        require(self, name, value is None or fits(value), rule)
