"""The command lines of MindIE's GLM-4-9B guide, in the words of `python -m quant`.

Takes the words typed after `python -m quant`, returns the flags they mean. Two forms are known:
`-src SRC -dst DST [-type NAME_w8a8]`, and for sparse weights the six words SRC W8A8S_DST CALIB TP
QUANT_DEVICE COMPRESS_DEVICES.
"""

from runtime.common.errors import ToolkitError
from runtime.common.progress import print_status

FORM = "SRC W8A8S_DST CALIB TP DEVICE DEVICES"
FLAGS = {
    "-src": "--model",
    "-dst": "--out",
    "-type": "--scheme",
    "-trust_remote_code": "--trust-remote-code",
}


def translated(argv: list[str]) -> list[str]:
    """The command line with the guide's words replaced; any other is returned unchanged."""
    places = _leading_words(argv)
    if len(places) > 1:
        return _sparse(places) + translated(argv[len(places) :])
    words = []
    for word in argv:
        if words and words[-1] == "--scheme":
            word = word.rpartition("_")[2]  # glm4_9b_w8a8s
        words.append(FLAGS.get(word, word))
    return words


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
    print_status(
        f"note: devices {words[4]} and {words[5]} are not used, calibration runs on the CPU; afterwards, "
        f"on the machine with the 310P: python -m quant compress --model {out} --out {out}c -tp {size}"
    )
    flags = ["--model", model, "--out", out, "--calib", calib]
    return [*flags, "--scheme", "w8a8s", "--dtype", "float16"]
