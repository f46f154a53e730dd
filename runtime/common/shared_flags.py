"""Flags that several commands have, each defined once, and the checks of their values.

Takes what differs between the commands (help text, default), returns a dataclass field as `flag`
does.
"""

from pathlib import Path

from .flags import flag, require

RANKS = (1, 2, 4, 8)

# what a quantised model must hold, in `python -m quant` and in runtime.compare: mean KL divergence
# of the next token from the float model in nats, share of tokens whose most likely successor stays
MAX_KL = 0.05
MIN_TOP1 = 0.9


def model_flag(help: str = "folder of a downloaded checkpoint", **default):
    return flag(help, "-m", "--model-path", metavar="DIR", **default)


def output_flag(help: str, *aliases: str, **default):
    return flag(help, "-o", "--output", *aliases, metavar="DIR", **default)


def language_flag():
    return flag(
        "wording of the prompt around the question (default: as released)",
        default=None,
        choices=("zh", "en"),
    )


def media_path_flag():
    return flag(
        "folder in which pictures that the jsonl file names may lie, beside the file's own folder "
        "(default: none)",
        default=None,
        metavar="DIR",
    )


def media_path(options) -> Path | None:
    """The folder of --allowed-local-media-path. ToolkitError if there is no such folder."""
    given = options.allowed_local_media_path
    if given is None:
        return None
    require(options, "allowed_local_media_path", Path(given).is_dir(), "there is no such folder")
    return Path(given)


def max_model_len_flag():
    return flag(
        "longest prompt + answer in tokens (default: what the model can, at most 8192)",
        default=None,
        kind=int,
        metavar="N",
    )


def tensor_parallel_flag(help: str):
    return flag(help, "-tp", "--tp", default=1, kind=int, metavar="N")


def check_tensor_parallel_size(options):
    require(
        options,
        "tensor_parallel_size",
        options.tensor_parallel_size in RANKS,
        "use 1, 2, 4 or 8",
    )
