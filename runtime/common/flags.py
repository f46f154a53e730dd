"""Dataclass fields that are also command-line flags.

Takes a command line, returns instances of the dataclasses, which are also what the Python API
takes. A command declares its fields with `flag`, checks their values in `__post_init__` with
`require`, and builds its parser with `Parser`; flags that several commands have are in
shared_flags.py. Nothing heavy is imported here, so that `--help` answers at once.
"""

import argparse
import difflib
import sys
from collections.abc import Callable
from dataclasses import MISSING, field, fields
from pathlib import Path

from .errors import USER_MISTAKE, ToolkitError

TRUST = "-trust_remote_code"  # as MindIE's guides write it, with one dash
# flags of guides for other programs -> what to do here
ELSEWHERE = {
    "--backend": "one engine runs the model here; leave it out",
    "--lora-path": "adapters are not read; merge the adapter into the checkpoint, and leave it out",
    "--quantization": "the checkpoint itself says how it is quantised; leave it out",
    "--acc": "python -m runtime.compare --dataset FILE.jsonl counts right answers",
}


def flag(
    help: str,
    *aliases: str,
    default=MISSING,
    kind: Callable = str,
    metavar: str | None = None,
    choices: tuple[str, ...] = (),
    many: bool = False,
    shorthand: tuple[str, Callable, str, str] | None = None,
):
    """A dataclass field that is also the flag --its-name.

    help: its line in `--help`, to which the default is added.
    aliases: other spellings, short ones ("-m") or long ones ("--model-path").
    default: of the field; without one the flag is required.
    kind: text -> value, e.g. int; bool makes a switch without a value.
    metavar: what `--help` shows for the value; the choices where it is not given.
    choices: the only values; `check_choices` refuses others, also those of the Python API.
    many: the flag may be repeated, and the field receives a list.
    shorthand: (flag, kind, metavar, help) of a second flag for the same field whose value is
        written otherwise.
    """
    if choices and not metavar:
        metavar = "{" + ",".join(choices) + "}"
    return field(
        default=default,
        metadata={
            "help": help,
            "aliases": aliases,
            "kind": kind,
            "metavar": metavar,
            "choices": choices,
            "many": many,
            "shorthand": shorthand,
        },
    )


def spelled(name: str) -> str:
    """Field name -> flag, as messages and help show it."""
    return "--" + name.replace("_", "-")


def require(options, name: str, fits: bool, rule: str):
    """Raise ToolkitError about field `name` unless its value `fits`; `rule` says what does, and an
    example."""
    if not fits:
        raise ToolkitError(f"{spelled(name)} is {getattr(options, name)!r}: {rule}")


def check_choices(options):
    """ToolkitError for a field whose value is none of its choices nor its default."""
    for f in fields(options):
        choices = f.metadata.get("choices")
        if choices:
            fits = getattr(options, f.name) in (*choices, f.default)
            require(options, f.name, fits, f"use one of {', '.join(choices)}")


def check_folder(name: str, path: str):
    """ToolkitError, before anything slow begins, unless the checkpoint folder that field `name`
    holds exists."""
    if not Path(path).exists():
        raise ToolkitError(
            f"{spelled(name)} {path} does not exist; give the folder of a downloaded checkpoint "
            "(a hub name is not downloaded for you)"
        )
    if not Path(path).is_dir():
        raise ToolkitError(
            f"{spelled(name)} {path} is a file; give the folder that holds config.json"
        )


class Help(argparse.HelpFormatter):
    """The same help on every Python and terminal: all spellings, the value once; 100 columns."""

    def __init__(self, prog, **kwargs):
        super().__init__(prog, max_help_position=30, width=100)

    def _format_action_invocation(self, action):
        spellings = ", ".join(action.option_strings)
        if action.nargs == 0:
            return spellings
        value = self._format_args(action, action.metavar or action.dest.upper())
        return f"{spellings} {value}"


class Parser(argparse.ArgumentParser):
    """The flags of one command, and those that every command has."""

    def __init__(self, command: str, usage: str, description: str, groups: dict[str, type]):
        """command: "python -m runtime.chat". usage: the arguments behind it, description: the
        paragraph below, as `--help` shows them. groups: title in `--help` -> dataclass whose fields
        are its flags."""
        super().__init__(
            prog=command,
            usage=f"{command} {usage}",
            description=description,
            formatter_class=Help,
            allow_abbrev=False,
            add_help=False,
        )
        self._classes = list(groups.values())
        for title, options in groups.items():
            group = self.add_argument_group(title)
            for f in fields(options):
                if "help" in f.metadata:
                    _add(group, f)
        self._add_common(self.add_argument_group("general"))

    def parse(self, argv: list[str]) -> list:
        """One instance of each dataclass, in the order of the groups. ToolkitError for what cannot
        be understood."""
        values, unknown = self.parse_known_args([kebab(a) for a in argv])
        if unknown:
            self.error(f"unknown argument {unknown[0]}" + self._advice(unknown[0]))
        if values.trust_remote_code:
            print(
                "note: --trust-remote-code is ignored; no code of a checkpoint is ever run",
                file=sys.stderr,
            )
        given = vars(values)
        return [self._instance(options, given) for options in self._classes]

    def _instance(self, options: type, given: dict):
        """Of a dataclass; fields that the command line leaves out have their defaults."""
        names = [f.name for f in fields(options)]
        return options(**{name: given[name] for name in names if name in given})

    def error(self, message: str):
        """argparse calls this for every mistake."""
        raise ToolkitError(f"{message}; see {self.prog} --help", USER_MISTAKE)

    def _add_common(self, group):
        group.add_argument("-h", "--help", action="help", help="show this help and exit")
        group.add_argument("--debug", action="store_true", help="show the traceback of an error")
        group.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="accepted and ignored: no code of a checkpoint is ever run",
        )

    def _advice(self, argument: str) -> str:
        name = argument.split("=")[0]
        if name in ELSEWHERE:
            return f": {ELSEWHERE[name]}"
        close = difflib.get_close_matches(name, self._option_string_actions, n=1)
        if not close:
            return ""
        return f" (did you mean {close[0]}?)"


def kebab(argument: str) -> str:
    """--max_tokens=a_b -> --max-tokens=a_b, -trust_remote_code with two dashes; anything else
    unchanged."""
    if argument == TRUST:
        argument = "-" + argument
    name, equals, value = argument.partition("=")
    if name.startswith("--"):
        name = name.replace("_", "-")
    return name + equals + value


def _add(group, f):
    """Add the flag of dataclass field `f` to an argparse group; what is not given is left to the
    dataclass."""
    meta = f.metadata
    settings = {
        "dest": f.name,
        "help": meta["help"] + _default_text(f.default),
        "required": f.default is MISSING,
        "default": argparse.SUPPRESS,
    }
    if meta["kind"] is bool:
        settings["action"] = "store_true"
    else:
        settings |= {"type": meta["kind"], "metavar": meta["metavar"]}
        if meta["many"]:
            settings["action"] = "append"
    group.add_argument(*_spellings(f.name, meta["aliases"]), **settings)
    if meta["shorthand"]:
        name, kind, metavar, help = meta["shorthand"]
        group.add_argument(
            name, dest=f.name, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=help
        )


def _spellings(name: str, aliases: tuple[str, ...]) -> list[str]:
    """As `--help` shows them: short aliases, the flag, long aliases."""
    short = [alias for alias in aliases if not alias.startswith("--")]
    long = [alias for alias in aliases if alias.startswith("--")]
    return [*short, spelled(name), *long]


def _default_text(default) -> str:
    if default in (MISSING, None, (), False):
        return ""
    return f" (default: {default})"


def limit_value(text: str) -> float:
    """ "name=0.01" of a --limit -> 0.01; ToolkitError where no number follows."""
    name, _, value = text.partition("=")
    try:
        return float(value)
    except ValueError:
        raise ToolkitError(f"--limit {text} has no number; write it like {name}=0.01") from None
