"""Progress bars on stderr for work counted in bytes or steps; silent where stderr is not a terminal."""

import sys
from contextlib import contextmanager


@contextmanager
def byte_progress(title: str):
    """Yields update(done, total), to be called with bytes."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)  # stdout belongs to results
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(
        *columns, transient=True, console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def step_progress(title: str, steps: int):
    """Yields advance(), to be called after each of `steps` steps."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(
        *columns, transient=True, console=console, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=steps)
        yield lambda: bar.advance(task)


@contextmanager
def spinner(title: str):
    """A sign of life for work that cannot be counted."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(title):
            yield
    else:
        yield


def say(text: str):
    print(text, file=sys.stderr, flush=True)


def track(role: str, cases: list, quiet: bool = False):
    """Iterate over the cases with a progress bar on stderr; quiet: each case shows one of its own."""
    from rich.console import Console
    from rich.progress import track as rich_track

    console = Console(stderr=True)
    return rich_track(
        cases,
        description=f"{role}: questions",
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
