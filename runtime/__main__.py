"""`python -m runtime --mode MODE`: the main.py of the VisualGLM guide, on our commands.

Takes run, performance, precision or predict as the mode, and runs runtime.chat, runtime.bench,
runtime.compare or runtime.predict; all other arguments go there unchanged.
"""

import importlib
import sys

from runtime.common.errors import ToolkitError, run_command
from runtime.common.flags import kebab

MODES = {
    "run": "chat",
    "performance": "bench.__main__",
    "precision": "compare.__main__",
    "predict": "predict.__main__",
}
USAGE = """\
usage: python -m runtime --mode MODE --model_path DIR [--device N] [options of the mode's command]

The four modes of the VisualGLM guide's main.py:
  run           talk with the model                          python -m runtime.chat
  performance   measure it in batches of 1, 2, 4 and 8       python -m runtime.bench
  precision     compare it with plain torch; the report      python -m runtime.compare
                goes to precision_report unless --out is given
  predict       answer a jsonl file, or without --input      python -m runtime.predict
                three questions about three pictures
--device N is NPU N; without it everything runs on the CPU.
`python -m runtime --mode MODE --help` shows the options of a mode.
"""


def main(argv) -> int:
    arguments = [kebab(argument) for argument in argv]
    mode, rest = take_mode(arguments)
    if mode is None and {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    if mode not in MODES:
        raise ToolkitError(
            f"--mode is {mode!r}: use one of {', '.join(MODES)}; see python -m runtime --help"
        )
    command = importlib.import_module(f"runtime.{MODES[mode]}")
    return command.main([*rest, *default_arguments(mode, rest)])


def take_mode(arguments: list[str]) -> tuple[str | None, list[str]]:
    """(value of --mode, the other arguments)."""
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name != "--mode":
            continue
        before = arguments[:index]
        after = arguments[index + 1 :]
        if equals:
            return value, before + after
        return "".join(after[:1]), before + after[1:]
    return None, arguments


def default_arguments(mode: str, arguments: list[str]) -> list[str]:
    """Arguments that our commands require and the guide's modes do without."""
    given = {argument.partition("=")[0] for argument in arguments}
    if mode == "performance" and not given & {"--batch-size", "--batch", "--perf", "--demo"}:
        return ["--batch-size", "1,2,4,8"]
    if mode == "precision" and not given & {"--out", "-h", "--help"}:
        return ["--out", "precision_report"]
    if mode == "predict" and not given & {"--input", "--examples", "-h", "--help"}:
        return ["--examples"]
    return []


if __name__ == "__main__":
    sys.exit(run_command(main))
