"""Every flag once: dataclass field -> command-line flag -> the same dataclass, which is also what the Python API takes.

In flows a command line (or keyword arguments), out flow checked dataclass instances. Nothing heavy is imported here, so
that `--help` answers at once. Commands add their own fields with `flag` and build their parser with `Parser`.
"""

import argparse
import difflib
import sys
from dataclasses import MISSING, field, fields
from pathlib import Path

from .errors import USER_MISTAKE, ToolkitError


def flag(
    help, *aliases, default=MISSING, kind=str, metavar=None, choices=(), many=False, shorthand=None
):
    """A dataclass field that is also a flag: --its-name and `aliases`. No default = required; many = repeatable.

    `shorthand`: (flag, kind, metavar, help) of a second flag for the same field whose value is written otherwise.
    """
    shown = metavar or ("{" + ",".join(choices) + "}" if choices else None)
    return field(
        default=default,
        metadata={
            "help": help,
            "aliases": aliases,
            "kind": kind,
            "metavar": shown,
            "choices": choices,
            "many": many,
            "shorthand": shorthand,
        },
    )


def spelled(name: str) -> str:
    """Field name -> flag, as messages and help show it."""
    return "--" + name.replace("_", "-")


def require(options, name: str, fits: bool, rule: str):
    """Raise ToolkitError about field `name` unless its value `fits`; `rule` says what does, and an example."""
    if not fits:
        raise ToolkitError(f"{spelled(name)} is {getattr(options, name)!r}: {rule}")


def check_choices(options):
    for f in fields(options):
        known = f.metadata.get("choices")
        if known:
            require(
                options,
                f.name,
                getattr(options, f.name) in (*known, f.default),
                f"use one of {', '.join(known)}",
            )


def check_folder(name: str, path: str):
    """A checkpoint folder must exist before anything slow begins."""
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
    """The same help on every Python and terminal: all spellings, then the value once; 100 columns."""

    def __init__(self, prog, **kwargs):
        super().__init__(prog, max_help_position=30, width=100)

    def _format_action_invocation(self, action):
        value = (
            ""
            if action.nargs == 0
            else " " + self._format_args(action, action.metavar or action.dest.upper())
        )
        return ", ".join(action.option_strings) + value


class Parser(argparse.ArgumentParser):
    """The flags of one command: titled groups of dataclasses, and what every command has.

    `groups` is {title: dataclass}; `parse` returns one instance of each, in that order. Mistakes are ToolkitErrors.
    """

    def __init__(self, command: str, usage: str, description: str, groups: dict[str, type]):
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
        values, unknown = self.parse_known_args([kebab(a) for a in argv])
        if unknown:
            self.error(f"unknown argument {unknown[0]}" + self._nearest(unknown[0]))
        if values.trust_remote_code:
            print(
                "note: --trust-remote-code is ignored; no code of a checkpoint is ever run",
                file=sys.stderr,
            )
        return [
            options(
                **{
                    f.name: getattr(values, f.name)
                    for f in fields(options)
                    if hasattr(values, f.name)
                }
            )
            for options in self._classes
        ]

    def error(self, message):
        raise ToolkitError(f"{message}; see {self.prog} --help", USER_MISTAKE)

    def _add_common(self, group):
        group.add_argument("-h", "--help", action="help", help="show this help and exit")
        group.add_argument("--debug", action="store_true", help="show the traceback of an error")
        group.add_argument(
            "--trust-remote-code",
            action="store_true",
            help="accepted and ignored: no code of a checkpoint is ever run",
        )

    def _nearest(self, argument: str) -> str:
        close = difflib.get_close_matches(argument.split("=")[0], self._option_string_actions, n=1)
        return f" (did you mean {close[0]}?)" if close else ""


def kebab(argument: str) -> str:
    """--max_tokens=a_b -> --max-tokens=a_b; anything else unchanged."""
    name, equals, value = argument.partition("=")
    return (name.replace("_", "-") if name.startswith("--") else name) + equals + value


def _add(group, f):
    """Add the flag of dataclass field `f` to an argparse group; what is not given is left to the dataclass."""
    meta = f.metadata
    aliases = f.metadata["aliases"]
    names = [
        *(a for a in aliases if a[1] != "-"),
        spelled(f.name),
        *(a for a in aliases if a[1] == "-"),
    ]
    default = f" (default: {f.default})" if f.default not in (MISSING, None, (), False) else ""
    settings = {
        "dest": f.name,
        "help": meta["help"] + default,
        "required": f.default is MISSING,
        "default": argparse.SUPPRESS,
    }
    if meta["kind"] is bool:
        group.add_argument(*names, action="store_true", **settings)
    elif meta["many"]:
        group.add_argument(
            *names, action="append", type=meta["kind"], metavar=meta["metavar"], **settings
        )
    else:
        group.add_argument(*names, type=meta["kind"], metavar=meta["metavar"], **settings)
    if meta["shorthand"]:
        name, kind, metavar, help = meta["shorthand"]
        group.add_argument(
            name, dest=f.name, type=kind, metavar=metavar, default=argparse.SUPPRESS, help=help
        )


def limit_value(text: str) -> float:
    """The number of a --limit; ToolkitError when there is none."""
    name, _, value = text.partition("=")
    try:
        return float(value)
    except ValueError:
        raise ToolkitError(f"--limit {text} has no number; write it like {name}=0.01") from None
