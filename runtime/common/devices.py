"""Names of devices: takes what a user may write for one, returns the name that torch has for it."""

import re

from .errors import ToolkitError

WITHOUT_NUMBER = {"npu": "npu:0", "cuda": "cuda:0"}
# cards of other vendors, by the names that torch and the guides have for them
FOREIGN = (
    "gcu",
    "hpu",
    "ipu",
    "mlu",
    "mps",
    "mthreads",
    "musa",
    "rocm",
    "sdaa",
    "tpu",
    "xla",
    "xpu",
)


def device_name(spelling: str | int, flag: str = "--device") -> str:
    """ "cpu", "npu" or "2" -> "cpu", "npu:0", "npu:2". A bare number is the NPU of that number.

    ToolkitError, which names `flag`, for a device that this toolkit does not run on.
    """
    text = str(spelling).strip().lower()
    text = WITHOUT_NUMBER.get(text, text)
    if re.fullmatch(r"\d+", text):
        return f"npu:{int(text)}"
    if text == "cpu":
        return text
    kind, _, number = text.partition(":")
    if kind in WITHOUT_NUMBER and re.fullmatch(r"\d+", number):
        return f"{kind}:{int(number)}"
    if kind in FOREIGN:
        raise ToolkitError(
            f"{flag} is {spelling!r}: {kind} is a card of another vendor, for which there are no "
            "kernels here; use cpu, npu:N or cuda:N"
        )
    raise ToolkitError(
        f"{flag} is {spelling!r}: use cpu, npu, npu:N, cuda or cuda:N; a bare number N is npu:N"
    )


def is_bare_number(spelling: str | int) -> bool:
    """Whether `device_name` takes it for the number of an NPU."""
    return str(spelling).strip().isdigit()
