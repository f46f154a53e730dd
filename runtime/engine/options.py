"""Options of the engine and of sampling: takes what the user gave, returns checked dataclasses.

Each field is an argument of the Python API, and a flag of the commands where it has a help text.
"""

from dataclasses import dataclass, replace

from models.side_fields import SAMPLING, real, whole
from runtime.common.devices import device_name, is_bare_number
from runtime.common.errors import ToolkitError
from runtime.common.flags import check_choices, check_folder, flag, require, spelled
from runtime.common.notes import note
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

PACKED = ("int8", "int4")  # forms of --cpu-weights beside float


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
    """Of every command that runs a model: which model, which images, which prompt wording."""

    model: str = model_flag()
    image: tuple[str, ...] = flag(
        "picture, or pictures where the model takes several",
        "--input-image",
        "--input-vision-file",
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
    """Where and how a model runs; Engine(model_dir, **these). ToolkitError for a value that cannot
    be."""

    device: str = flag(
        "where the decoder runs: cpu, npu, npu:N, cuda or cuda:N; a bare number N is npu:N",
        default="cpu",
        metavar="DEVICE",
        shorthand=("--device-id", npu, "N", "the same as --device npu:N"),
    )
    dtype: str = flag(
        "weights and arithmetic of the decoder: auto, float32 (fp32), bfloat16 (bf16), float16 (fp16)",
        default="auto",
        metavar="DTYPE",
    )
    precision: str | None = flag(
        "the GLM-Edge guide's name: int8 and int4 are --cpu-weights, the others --dtype",
        default=None,
        choices=(*PACKED, "bfloat16", "float16", "float32"),
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
        "decoder operators: reference is plain torch, what the others are checked against",
        default="auto",
        choices=("auto", "reference", "cpu"),
    )
    kernels: str = flag(
        "NPU: whose attention kernels decode; auto takes the first set of the chip that torch_npu "
        "has (910B: aclnn, 310P: atb)",
        default="auto",
        choices=("auto", "aclnn", "atb"),
    )
    cpu_weights: str = flag(
        "CPU: pack the decoder's linear layers to 8 or 4 bits, once; less memory, faster, not exact",
        default="float",
        choices=("float", *PACKED),
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
    # tokens the KV cache holds; None = as many as sequences and memory allow
    cache_tokens: int | None = None
    layer_by_layer: bool = False  # one layer's weights in memory at a time; only for `score`
    judge_om: bool = True  # an .om without a manifest is compared with torch at its first use

    def __post_init__(self):
        self._name_device()
        self.dtype = dtype_name(self.dtype)
        self.keep_dtype = tuple(self.keep_dtype)
        check_choices(self)
        self._apply_precision()
        self._check_weight_forms()
        self._check_vision_precision()
        self._check_sizes()
        self._check_devices()

    def _name_device(self):
        given = self.device
        self.device = device_name(given)
        if is_bare_number(given):
            note(f"--device {given}: taken as {self.device}, the NPU of that number")

    def _apply_precision(self):
        """--precision becomes --cpu-weights or --dtype, whichever has its value."""
        if self.precision is None:
            return
        name = "cpu_weights" if self.precision in PACKED else "dtype"
        given = getattr(self, name)
        require(
            self,
            "precision",
            given in ("auto", "float", self.precision),
            f"{spelled(name)} is {given!r}; give one of the two",
        )
        setattr(self, name, self.precision)
        self.precision = None

    def _check_weight_forms(self):
        on_cpu = self.device == "cpu"
        plain = on_cpu and self.cpu_weights == "float" and self.tensor_parallel_size == 1
        require(
            self,
            "cpu_weights",
            self.cpu_weights == "float" or (on_cpu and self.ops != "reference"),
            "it needs --device cpu, and --ops auto or cpu",
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
            not self.layer_by_layer or (plain and not self.keep_dtype),
            "it needs --device cpu, --cpu-weights float and one process, and no --keep-dtype",
        )

    def _check_vision_precision(self):
        require(
            self,
            "vision_precision",
            self.vision_precision == "fp32" or self.vision in ("auto", "torch"),
            f"--vision {self.vision} runs what was converted; use --vision torch",
        )

    def _check_sizes(self):
        self._check_at_least_one("block_size", 16)
        self._check_at_least_one("max_num_seqs", 8)
        self._check_at_least_one("max_num_batched_tokens", 8)
        share_fits = 0 < self.memory_utilization <= 1
        require(self, "memory_utilization", share_fits, "above 0 and up to 1 is needed, e.g. 0.9")
        self._check_at_least_one("max_model_len", 2048)

    def _check_at_least_one(self, name: str, example: int):
        value = getattr(self, name)
        require(self, name, value is None or value >= 1, f"1 or more is needed, e.g. {example}")

    def _check_devices(self):
        check_tensor_parallel_size(self)
        require(
            self,
            "tensor_parallel_size",
            self.tensor_parallel_size == 1 or "cuda" not in self.device,
            "a decoder runs on one GPU; use 1",
        )


def one_at_a_time(options: EngineOptions) -> EngineOptions:
    """For a command that answers one question after another: no cache for more, unless the user
    says so."""
    return replace(options, max_num_seqs=options.max_num_seqs or 1)


@dataclass
class SamplingParams:
    """How one answer is sampled; None = the default of the model's release. ToolkitError for a
    value that cannot be."""

    max_tokens: int | None = flag(
        "longest answer in tokens (default: up to the model's length limit)",
        "--max-length",
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
    # drop tokens less likely than this share of the likeliest one's probability
    min_p: float | None = None
    presence_penalty: float = 0.0  # taken from the logits of tokens that the answer has
    frequency_penalty: float = 0.0  # the same, for every time that the answer has them
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    # end the answer and are no part of it, also with ignore_eos
    stop_token_ids: tuple[int, ...] = ()
    # how many of the likeliest tokens stand in Result.logprobs, besides the chosen one
    logprobs: int | None = None
    # the same in Result.prompt_logprobs, for the tokens of the prompt
    prompt_logprobs: int | None = None
    # the answer goes on with the prompt's text: it is shown as it is, not as a chat's answer
    continue_text: bool = False

    def __post_init__(self):
        self.stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        self.stop_token_ids = tuple(self.stop_token_ids)
        for name, (rule, hint) in SAMPLING_RULES.items():
            value = getattr(self, name)
            fits = value is None or rule.fits(value)
            require(self, name, fits, f"{rule.words} is needed; {hint}")
            if name in COUNTS and value is not None:
                setattr(self, name, int(value))


COUNTS = ("max_tokens", "top_k")  # whole floats become ints
# field of SamplingParams -> (what a value must be, an example or what its end means), in the order
# in which they are checked; those that generation_config.json has, too, are the same there
SAMPLING_RULES = {
    "max_tokens": (SAMPLING["max_new_tokens"], "e.g. 256"),
    "temperature": (SAMPLING["temperature"], "0 takes the most likely token"),
    "top_p": (SAMPLING["top_p"], "to take the most likely token give --temperature 0"),
    "top_k": (SAMPLING["top_k"], "0 keeps all tokens"),
    "repetition_penalty": (SAMPLING["repetition_penalty"], "1 switches it off"),
    "min_p": (SAMPLING["min_p"], "0 keeps all tokens"),
    "presence_penalty": (real(-2, 2), "0 switches it off"),
    "frequency_penalty": (real(-2, 2), "0 switches it off"),
    "logprobs": (whole(0, (1 << 31) - 1), "e.g. 5"),
    "prompt_logprobs": (whole(0, (1 << 31) - 1), "e.g. 5"),
    "seed": (whole(0, (1 << 63) - 1), "e.g. 1"),
}
