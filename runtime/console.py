"""`ascend-vlm COMMAND`: the commands, started so that nothing is imported from the folder where the user stands.

Takes the arguments of `python -m`, returns the same exit codes. `python -m` itself looks for modules
in the current folder first, where a downloaded `torch.py` may lie; so does every Python where
PYTHONPATH has an empty part, as PYTHONPATH=/a:$PYTHONPATH leaves one.
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # where our own packages lie
COMMANDS = {
    "chat": "runtime.chat",
    "serve": "runtime.serve.__main__",
    "ui": "runtime.ui.__main__",
    "predict": "runtime.predict.__main__",
    "bench": "runtime.bench.__main__",
    "compare": "runtime.compare.__main__",
    "convert": "convert.__main__",
    "nodes": "convert.nodes.__main__",
    "quant": "quant.__main__",
    "plan": "runtime.plan.__main__",
    "doctor": "runtime.doctor.__main__",
    "synthetic": "models.synthetic.__main__",
}
NAMES = ", ".join(COMMANDS)
USAGE = f"""\
usage: ascend-vlm COMMAND [options]

COMMAND: {NAMES}

Each takes the options of its `python -m` form, `ascend-vlm chat` those of `python -m runtime.chat`;
`ascend-vlm COMMAND --help` shows them. Unlike `python -m` it imports nothing from the current
folder, so it may be typed inside a folder that somebody else made.
"""


def leave_current_folder_out():
    """Nothing is imported from the current folder from now on, neither here nor in Python processes
    that this one starts."""
    sys.path[:] = _without_current_folder(sys.path)
    given = os.environ.get("PYTHONPATH")
    if given is not None:
        kept = _without_current_folder(given.split(os.pathsep))
        os.environ["PYTHONPATH"] = os.pathsep.join(kept)
    os.environ["PYTHONSAFEPATH"] = "1"  # what -P sets, from Python 3.11 on


def _without_current_folder(places: list[str]) -> list[str]:
    """An empty place, too, stands for the current folder."""
    here = os.path.realpath(os.curdir)
    if here == ROOT:
        return places
    return [place for place in places if place and os.path.realpath(place) != here]


def main() -> int:
    leave_current_folder_out()  # first: what follows imports
    from runtime.common.errors import run_command

    return run_command(run)


def run(arguments: list[str]) -> int:
    """The exit code of `arguments`: a command's name, and what it takes."""
    import importlib

    from runtime.common.errors import ToolkitError

    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if name not in COMMANDS:
        raise ToolkitError(f"{name} is no command: use one of {NAMES}; see ascend-vlm --help")
    return importlib.import_module(COMMANDS[name]).main(arguments[1:])
