"""Synthetic checkpoints: a released layout in real shapes, random weights, for a rehearsal.

    python -m models.synthetic --like visualglm-6b --out DIR [--scale full|tiny] [--seed 0]

Takes a release's config (models/released/*.json); names and shapes come from the family's own
weight table. Writes safetensors shards, index, tokenizer and config.json. Tensors are streamed in
small blocks and seeded one by one, so that the bytes do not depend on where a run was interrupted.
Finished shards are kept; index and config.json come last.
"""

import argparse
import shlex
import sys

from models import RELEASED
from models.errors import ModelError
from models.terminal import printable, replace_unprintable


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m models.synthetic",
        description="Write a checkpoint in a released layout with random weights. "
        "An interrupted run goes on where it stopped.",
    )
    names = sorted(file.stem for file in RELEASED.glob("*.json"))
    parser.add_argument("--like", required=True, choices=names, help="the release to imitate")
    parser.add_argument("--out", required=True, help="directory to write, new or empty")
    parser.add_argument(
        "--scale",
        choices=("full", "tiny"),
        default="full",
        help="real shapes, or small ones (1 MB)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all weights (default 0)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """The command; exit code 0, or 2 for a user mistake."""
    replace_unprintable()
    options = _parser().parse_args(arguments)
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from .write import write_checkpoint

    columns = (
        TextColumn("writing"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    try:
        with Progress(*columns) as bar:
            task = bar.add_task("", total=None)
            write_checkpoint(
                options.like,
                options.out,
                options.scale,
                options.seed,
                bar.console.print,
                lambda done, total: bar.update(task, completed=done, total=total),
            )
    except KeyboardInterrupt:
        if options.debug:
            raise
        print("error: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except (ModelError, OSError) as error:
        if options.debug:
            raise
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    print(
        f"{options.out} is a complete checkpoint; "
        f"next: python -m convert --model {shlex.quote(options.out)} --out ARTIFACT"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
