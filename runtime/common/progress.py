"""Progress on stderr: status lines, and bars for work counted in bytes, steps or tokens.

Takes titles and counts, returns callables that move a bar. Bars are silent where stderr is not a
terminal; stdout belongs to results.
"""

import sys
from contextlib import contextmanager

from models.terminal import printable


def print_status(text: str):
    """Print to stderr at once."""
    print(printable(text), file=sys.stderr, flush=True)


@contextmanager
def byte_progress(title: str):
    """Yields update(done, total), to be called with bytes."""
    from rich.progress import DownloadColumn

    with _bar(title, DownloadColumn()) as (bar, task):
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def step_progress(title: str, steps: int):
    """Yields advance(), to be called after each of `steps` steps."""
    from rich.progress import MofNCompleteColumn

    with _bar(title, MofNCompleteColumn(), steps) as (bar, task):
        yield lambda: bar.advance(task)


@contextmanager
def token_progress(tokens: int):
    """Yields set_title(text) and advance(tokens), for cases that differ a hundredfold in tokens."""
    from rich.progress import MofNCompleteColumn

    with _bar("", MofNCompleteColumn(), tokens) as (bar, task):

        def set_title(text: str):
            bar.update(task, description=text)

        def advance(count: int):
            bar.advance(task, count)

        yield set_title, advance


def track(title: str, items, quiet: bool = False):
    """Iterate over `items` (with a length) behind a bar; none if `quiet`, where each item shows its
    own."""
    from rich.progress import track as rich_track

    console = _console()
    return rich_track(
        items, title, console=console, transient=True, disable=quiet or not console.is_terminal
    )


@contextmanager
def spinner(title: str):
    """A sign of life for work that cannot be counted."""
    console = _console()
    if console.is_terminal:
        with console.status(title):
            yield
    else:
        yield


@contextmanager
def _bar(title: str, count_column, total: int | None = None):
    """Yields (rich Progress, task): title, bar, count, time left; gone when the block ends."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = _console()
    columns = (TextColumn("{task.description}"), BarColumn(), count_column, TimeRemainingColumn())
    with Progress(
        *columns, transient=True, console=console, disable=not console.is_terminal
    ) as bar:
        yield bar, bar.add_task(title, total=total)


def _console():
    from rich.console import Console

    return Console(stderr=True)
