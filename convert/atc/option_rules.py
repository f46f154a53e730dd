"""ATC's option grammar. Takes options, raises at once what atc would refuse after minutes.

The table `option_rules.json` holds names, values and the first CANN version of each option (7.0 to
9.x; none = all of them), and what convert sets itself.
"""

import json
import re
from difflib import get_close_matches
from functools import cache
from pathlib import Path

from convert.verify.images import SMALL_PATCHES
from models.config import BLOCK_PATCHES
from runtime.ascend.cann import numbers
from runtime.common.errors import ToolkitError

OLDEST = (7, 0)  # reads our graphs' opset 17
PATH = re.compile(r"[\w./-]+", re.ASCII)
CHINESE = re.compile("[\u4e00-\u9fa5]")
MAX_PATH = 4096  # bytes
MAX_GEARS = 100
BF16 = ("bf16", "bfloat16")
BF16_CHIPS = re.compile(r"Ascend(910B\d|910_93|310B|950)")
IMPLEMENTATIONS = ("high_precision", "high_performance")
MIXED = ("mixed_", "allow_mix_precision")


@cache
def table() -> dict:
    return json.loads(Path(__file__).with_name("option_rules.json").read_text(encoding="utf-8"))


def parse_extra(arguments) -> dict[str, str]:
    """{option: value} of --atc-arg's values, KEY=VALUE or --key=value; ToolkitError for others."""
    options = {}
    for argument in arguments:
        name, equals, value = argument.strip().lstrip("-").partition("=")
        name = name.strip().replace("-", "_")
        if not (name and equals and value):
            raise ToolkitError(
                f"--atc-arg is {argument!r}: give one option with its value, e.g. --atc-arg log=info"
            )
        if name in options:
            raise ToolkitError(f"--atc-arg gives {name} twice; give it once")
        _check_allowed(name)
        if table()["options"][name].get("file"):
            value = _existing_file(name, value)
        options[name] = value
    return options


def _existing_file(name: str, value: str) -> str:
    """Its absolute path, because atc runs in a directory of its own."""
    if not Path(value).is_file():
        raise ToolkitError(f"--atc-arg {name}: the file {value} does not exist")
    check_path(Path(value).resolve())
    return str(Path(value).resolve())


def _check_allowed(name: str):
    entry = table()["options"].get(name)
    if entry is None:
        close = get_close_matches(name, table()["options"], n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ToolkitError(f"--atc-arg {name}: no atc of CANN 7.0 to 9.x has this option{hint}")
    if "own" in entry:
        raise ToolkitError(f"--atc-arg {name} would replace what convert sets: {entry['own']}")
    if "refused" in entry:
        raise ToolkitError(f"--atc-arg {name}: {entry['refused']}")


def parse_gears(text: str) -> tuple[int, ...]:
    """ "1,2,4" -> (1, 2, 4), sorted; ToolkitError for what ATC or a single picture cannot use."""
    shown = text[:40]
    gears = _sorted_numbers(text)
    if not gears:
        raise ToolkitError(
            f"--dynamic-batch is {shown!r}: give batch sizes with commas, e.g. 1,2,4,8"
        )
    if not _are_gears(gears) or gears[0] < 1:
        raise ToolkitError(
            f"--dynamic-batch is {shown!r}: 2 to {MAX_GEARS} different sizes above 0 are needed, "
            "e.g. 1,2,4,8"
        )
    if gears[0] != 1:
        raise ToolkitError(
            f"--dynamic-batch is {shown!r}: 1 must be among the sizes, for a single picture"
        )
    return gears


def parse_patch_gears(text: str) -> tuple[int, ...]:
    """ "256,1024" -> (256, 1024), sorted; ToolkitError for what ATC or the encoder cannot use."""
    gears = _sorted_numbers(text)
    if not gears:
        why = "numbers of patches with commas are needed"
    elif not _are_gears(gears):
        why = f"2 to {MAX_GEARS} different numbers are needed"
    elif gears[0] < BLOCK_PATCHES or any(gear % BLOCK_PATCHES for gear in gears):
        why = f"each must be a multiple of {BLOCK_PATCHES}, the patches of a block"
    elif gears[-1] < SMALL_PATCHES:
        why = f"the last must be {SMALL_PATCHES} at least, for the verification"
    else:
        return gears
    raise ToolkitError(f"--gears is {text[:40]!r}: {why}, e.g. 256,1024,4096")


def _sorted_numbers(text: str) -> tuple[int, ...]:
    """Of a text such as "4,1,2"; () where something else stands in it."""
    numbers = [number.strip() for number in text.split(",")]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        return ()
    return tuple(sorted(map(int, numbers)))


def _are_gears(numbers: tuple[int, ...]) -> bool:
    """Whether ATC takes so many, all different."""
    return 2 <= len(numbers) <= MAX_GEARS and len(set(numbers)) == len(numbers)


def precision_option(mode: str) -> tuple[str, str]:
    """ATC's option for a precision mode, old or new spelling; ToolkitError for an unknown one."""
    for option in ("precision_mode_v2", "precision_mode"):
        if mode in table()["options"][option]["values"]:
            return option, mode
    known = ", ".join(table()["options"]["precision_mode_v2"]["values"])
    raise ToolkitError(
        f"--precision-mode is {mode!r}: use auto, {known}, or an old name such as "
        "allow_mix_precision"
    )


def check_soc(name: str):
    """ToolkitError unless `name` is a --soc_version.

    Ascend910B without a digit is another, older chip than 910B1 to 910B4.
    """
    if name == "Ascend910B":
        raise ToolkitError(
            "--soc-version Ascend910B is the first 910, not an Atlas A2; "
            "give the full name of `npu-smi info`, e.g. Ascend910B3"
        )
    known = [f"Ascend{chip}" for chip in table()["socs"]]
    if name in known or re.fullmatch(r"Ascend950(DT|PR)_\w+", name):
        return
    by_lower = {soc.lower(): soc for soc in known}
    meant = f"ascend{name.lower().removeprefix('ascend')}"
    close = get_close_matches(meant, by_lower, n=1, cutoff=0.8)
    example = by_lower[close[0]] if close else "Ascend910B3 or Ascend310P3"
    raise ToolkitError(
        f"--soc-version is {name!r}: give `Ascend` and the chip name of `npu-smi info`, e.g. {example}"
    )


def check_options(options: dict[str, str], cann: str | None):
    """ToolkitError for an option, a value or a combination that atc refuses.

    `cann`: the version that atc belongs to, e.g. "8.0.RC2"; None: any.
    """
    version = numbers(cann)[:2] if cann else None
    if version and version < OLDEST:
        raise ToolkitError(f"CANN {cann} does not read opset 17 graphs; install CANN 7.0 or newer")
    for name, value in options.items():
        _check_value(name, value)
        _check_since(name, value, cann, version)
    _check_together(options)
    _check_precision(options)


def _check_value(name: str, value: str):
    entry = table()["options"][name]
    if value not in entry.get("values", [value]):
        why = f" ({entry['reason']})" if "reason" in entry else ""
        raise ToolkitError(
            f"atc option {name} is {value!r}: use one of {', '.join(entry['values'])}{why}"
        )
    if not re.fullmatch(entry.get("pattern", ".*"), value):
        raise ToolkitError(
            f"atc option {name} is {value!r}: it does not have the form {entry['pattern']}"
        )


def _check_since(name: str, value: str, cann: str | None, version: tuple[int, int] | None):
    entry = table()["options"][name]
    since = entry.get("value_since", {}).get(value) or entry.get("since")
    if version and since and version < numbers(since):
        raise ToolkitError(
            f"atc option {name}={value} needs CANN {since}, installed is {cann}; leave it out"
        )


def _check_together(options: dict[str, str]):
    for group in table()["exclusive"]:
        given = [name for name in group if name in options]
        if len(given) > 1:
            raise ToolkitError(
                f"atc options {' and '.join(given)} exclude each other; leave one out"
            )
    implementation = options.get("op_select_implmode")
    if "optypelist_for_implmode" in options and implementation not in IMPLEMENTATIONS:
        raise ToolkitError(
            "atc option optypelist_for_implmode needs op_select_implmode="
            f"{' or '.join(IMPLEMENTATIONS)} beside it"
        )
    if "insert_op_conf" in options and options["input_format"] != "NCHW":
        raise ToolkitError(
            f"--aipp works on NCHW inputs only, not on input_format={options['input_format']}"
        )
    deterministic = int(options.get("deterministic", 0)) > 0
    level = int(options.get("deterministic_level", 0)) > 0
    if "deterministic_level" in options and deterministic != level:
        raise ToolkitError(
            "atc options deterministic and deterministic_level must both be 0 or both be above 0"
        )


def _check_precision(options: dict[str, str]):
    mode = options.get("precision_mode_v2") or options.get("precision_mode", "")
    soc = options["soc_version"]
    if mode.endswith(BF16) and not BF16_CHIPS.match(soc):
        raise ToolkitError(
            f"--precision-mode {mode} needs bfloat16, which {soc} does not have; use fp16, "
            "mixed_float16 or origin"
        )
    if mode.endswith("hif8") and not soc.startswith("Ascend950"):
        raise ToolkitError(f"--precision-mode {mode} is for the Ascend950 only, not {soc}")
    if "modify_mixlist" in options and not mode.startswith(MIXED):
        raise ToolkitError(
            f"atc option modify_mixlist needs a mixed precision mode, not {mode}; give "
            "--precision-mode mixed_float16"
        )
    if "compression_optimize_conf" in options and mode in ("origin", "force_fp32"):
        raise ToolkitError(
            f"atc option compression_optimize_conf cannot be used with precision mode {mode}"
        )


def check_path(path: str | Path):
    """ToolkitError unless atc takes the path.

    Letters, digits, Chinese characters, `_`, `-` and `.`, of at most MAX_PATH bytes in all.
    """
    text = str(path)
    odd = sorted(set(PATH.sub("", CHINESE.sub("", text))))
    if odd:
        raise ToolkitError(
            f"atc takes no path with {' '.join(map(repr, odd))} in it: {text}; use letters, digits, "
            "Chinese characters and _ - . only"
        )
    if len(text.encode()) > MAX_PATH:
        raise ToolkitError(
            f"atc takes paths of {MAX_PATH:,} bytes at most, this one has {len(text.encode()):,}: "
            f"{text[:60]}...; choose a shorter --out"
        )
