"""Options of `python -m quant`, and the command lines of MindIE's GLM-4-9B guide in its words.

Two forms of the guide are known: `-src SRC -dst DST [-type NAME_w8a8]`, and for sparse weights the
six words SRC W8A8S_DST CALIB TP QUANT_DEVICE COMPRESS_DEVICES.
"""

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from runtime.common.errors import ToolkitError
from runtime.common.flags import check_choices, check_folder, flag, require
from runtime.common.progress import print_status
from runtime.common.shared_flags import (
    MAX_KL,
    MIN_TOP1,
    RANKS,
    check_tensor_parallel_size,
    media_path,
    media_path_flag,
    model_flag,
    output_flag,
    tensor_parallel_flag,
)

SCHEMES = ("w8a8", "w8a8s", "w8a8-dynamic", "w8a16")
FORM = "SRC W8A8S_DST CALIB TP DEVICE DEVICES"
FLAGS = {
    "-src": "--model",
    "-dst": "--out",
    "-type": "--scheme",
}
LAYOUTS = ("ascend", "mindie")
COMPRESSED = (
    "w8a8sc is w8a8s compressed for the 310P: run python -m quant --scheme w8a8s --dtype float16 here and, on a "
    "machine with CANN, python -m quant compress --model THAT_FOLDER --out DIR -tp RANKS"
)
ANTI = ("m1", "m2", "m3", "m4", "m5", "m6", "none")


@dataclass(kw_only=True)
class QuantOptions:
    model: str = model_flag()
    out: str = output_flag(
        "folder to write the quantised checkpoint to (made if missing)",
        "--save-directory",
        "--save-path",
    )
    scheme: str = flag(
        "8-bit weights and activations with stored scales; the same with mostly 4-bit weights, sparse; with "
        "scales per token; 8-bit weights alone",
        default="w8a8",
        choices=SCHEMES,
    )
    dtype: str = flag(
        "float type of the result: float16 (310P takes no other), bfloat16, auto (as the checkpoint)",
        default="auto",
        choices=("auto", "float16", "bfloat16"),
    )
    layout: str = flag(
        "file names: shards with an index and quant_model_description.json, which MindIE and vllm-ascend "
        "read; mindie: the guide's one quant_model_weight_w8a8.safetensors and "
        "quant_model_description_w8a8.json, which vllm-ascend does not find",
        default="ascend",
        choices=LAYOUTS,
    )

    def __post_init__(self):
        if self.scheme == "w8a8sc":
            raise ToolkitError(COMPRESSED)
        check_choices(self)
        check_folder("model", self.model)


@dataclass(kw_only=True)
class CalibrationOptions:
    calib: str | None = flag(
        'jsonl file to measure activations on, one {"text": ...} or {"messages": [...]} a line '
        "(default: a small Chinese and English set)",
        "--calib-file",
        default=None,
        metavar="FILE",
    )
    allowed_local_media_path: str | None = media_path_flag()
    samples: int = flag("most lines used of it", default=24, kind=int, metavar="N")
    seed: int = flag("draws the lines when there are more", default=0, kind=int, metavar="N")

    def __post_init__(self):
        require(self, "samples", self.samples >= 1, "1 or more is needed, e.g. 24")
        require(
            self, "calib", self.calib is None or Path(self.calib).is_file(), "there is no such file"
        )
        media_path(self)


@dataclass(kw_only=True)
class RecipeOptions:
    anti: str | None = flag(
        "msmodelslim's anti-outlier method (default: what Ascend publishes for the model)",
        "--anti-method",
        default=None,
        choices=ANTI,
    )
    act_method: int | None = flag(
        "how input scales are found: 1 min-max, 2 histogram, 3 chosen per layer (default: as "
        "published)",
        default=None,
        kind=int,
        metavar="1|2|3",
    )
    disable_level: str | None = flag(
        "LN: the N linear layers with the widest inputs stay float (default: as published)",
        default=None,
        metavar="LN",
    )
    keep_float: tuple[str, ...] = flag(
        "name of a linear layer that stays float, * stands for anything; may be repeated",
        default=(),
        metavar="NAME",
        many=True,
    )
    fraction: float = flag(
        "w8a8s: share of each row's weights that may exceed 4 bits",
        default=0.01,
        kind=float,
        metavar="F",
    )

    def __post_init__(self):
        self.keep_float = tuple(self.keep_float)
        check_choices(self)
        require(self, "act_method", self.act_method in (None, 1, 2, 3), "use 1, 2 or 3")
        level = self.disable_level
        require(
            self,
            "disable_level",
            level is None or (level[:1] == "L" and level[1:].isdecimal()),
            "use L and a number, e.g. L25",
        )
        require(self, "fraction", 0.01 <= self.fraction <= 0.1, "from 0.01 to 0.1 is possible")


@dataclass(kw_only=True)
class GateOptions:
    max_kl: float = flag(
        "most KL divergence of the next token from the float model, mean over held-out text, in nats",
        default=MAX_KL,
        kind=float,
        metavar="KL",
    )
    min_top1: float = flag(
        "least share of held-out tokens whose most likely successor stays the same",
        default=MIN_TOP1,
        kind=float,
        metavar="P",
    )

    def __post_init__(self):
        require(self, "max_kl", self.max_kl > 0, "more than 0 is needed, e.g. 0.05")
        require(self, "min_top1", 0 <= self.min_top1 <= 1, "from 0 to 1 is possible")


@dataclass(kw_only=True)
class CompressOptions:
    model: str = model_flag("folder that --scheme w8a8s wrote, in float16")
    out: str = output_flag(
        "folder to write config.json and one folder per rank to (made if missing)",
        "--save-directory",
    )
    tensor_parallel_size: int = tensor_parallel_flag("ranks that will run it: 1, 2, 4 or 8")

    def __post_init__(self):
        check_folder("model", self.model)
        check_tensor_parallel_size(self)


def translated(argv: list[str]) -> list[str]:
    """The command line with the guide's words replaced; any other is returned unchanged."""
    places = _leading_words(argv)
    if len(places) > 1:
        return _sparse(places) + translated(argv[len(places) :])
    words = []
    for word in _separated(argv):
        if words and words[-1] == "--scheme":
            word = word.rpartition("_")[2]  # glm4_9b_w8a8s
        words.append(FLAGS.get(word, word))
    return words


def _separated(argv: list[str]) -> Iterator[str]:
    """-src=DIR as -src DIR."""
    for word in argv:
        name, equals, value = word.partition("=")
        if equals and name in FLAGS:
            yield name
            yield value
        else:
            yield word


def _leading_words(argv: list[str]) -> list[str]:
    words = []
    for word in argv:
        if word.startswith("-"):
            break
        words.append(word)
    return words


def _sparse(words: list[str]) -> list[str]:
    """The flags of the guide's sparse form; its second half, compression, is another command."""
    if len(words) != len(FORM.split()):
        raise ToolkitError(
            f"{len(words)} words without a flag ({' '.join(words)}); give --model DIR --out DIR, or the "
            f"guide's six: {FORM}"
        )
    model, out, calib, size, *_ = words
    if size not in map(str, RANKS):
        raise ToolkitError(f"TP is {size!r}: use one of {', '.join(map(str, RANKS))}")
    compression = ["python", "-m", "quant", "compress", "--model", out, "--out", f"{out}c"]
    compression += ["-tp", size]
    print_status(
        f"note: devices {words[4]} and {words[5]} are not used, calibration runs on the CPU; afterwards, "
        f"on the machine with the 310P: {shlex.join(compression)}"
    )
    flags = ["--model", model, "--out", out, "--calib", calib]
    return [*flags, "--scheme", "w8a8s", "--dtype", "float16"]
