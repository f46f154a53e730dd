"""The file of answers, which a killed run leaves in a state that the next one continues from.

Takes the job and finished lines, writes OUT.partial, and OUT when all lines are there.
"""

import fcntl
import hashlib
import json
import os
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from models.files import named, open_own
from runtime.common.errors import ToolkitError
from runtime.common.files import write_atomically
from runtime.common.jsonl import as_line


def job_description(options, engine_options, sampling) -> dict:
    """What must be the same when a run is continued, or its answers would not belong together."""
    return {
        "input": hashlib.sha256(Path(options.input).read_bytes()).hexdigest(),
        "model": str(Path(options.model).resolve()),
        "language": options.language,
        "pictures": options.allowed_local_media_path,
        "batch_size": options.batch_size,
        "engine": asdict(engine_options),
        "sampling": asdict(sampling),
    }


@contextmanager
def open_answer_file(out: Path, job: dict):
    """The AnswerFile of a new or a continued run, locked until the block ends.

    ToolkitError if another process writes it, it belongs to another job, or `out` exists already.
    """
    if out.exists():
        raise ToolkitError(f"--out {out} exists already; remove it, or give another name")
    partial = out.with_name(out.name + ".partial")
    with open_own(partial, "a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ToolkitError(
                f"another process is writing {partial}; wait for it, or give another --out"
            ) from None
        stream.seek(0)
        yield AnswerFile(out, partial, stream, job)


class AnswerFile:
    """The partial file: the job as JSON, then finished lines."""

    def __init__(self, out: Path, partial: Path, stream, job: dict):
        self.out = out
        self.partial = partial
        self.stream = stream
        self._head = (json.dumps(job) + "\n").encode()
        self._lines = self._finished_lines()

    @property
    def count(self) -> int:
        """How many lines are finished."""
        return len(self._lines)

    def keep_whole_batches(self, batch_size: int, total: int):
        """Forget the lines of a batch that was not appended to its end."""
        if self.count < total:
            self._lines = self._lines[: self.count // batch_size * batch_size]
        self._cut_after([self._head, *self._lines])

    def append(self, lines: list[dict]):
        """Add the finished lines of one batch, and wait until they are on disk."""
        encoded = [as_line(line) for line in lines]
        self._write(b"".join(encoded))
        self._lines += encoded

    def publish(self) -> int:
        """Give the finished file its name; returns how many lines failed."""
        write_atomically(self.out, b"".join(self._lines))
        self.partial.unlink()
        return sum("error" in json.loads(line) for line in self._lines)

    def _finished_lines(self) -> list[bytes]:
        """Lines of an earlier run of this job; a new file begins with the job."""
        head, *lines = self.stream.read().splitlines(keepends=True) or [b""]
        if not head.endswith(b"\n"):  # new, or killed within the first line
            self._cut_after([])
            self._write(self._head)
            return []
        if head != self._head:
            raise ToolkitError(
                f"{self.partial} was begun with another model, input or other options; remove it, "
                "or give another --out"
            )
        return [line for line in lines if line.endswith(b"\n")]

    def _write(self, data: bytes):
        """OSError names the file; what could not be written is not tried again."""
        try:
            with named(self.partial):
                self.stream.write(data)
                self.stream.flush()
                os.fsync(self.stream.fileno())
        except OSError:
            self.stream.raw.close()
            raise

    def _cut_after(self, lines: list[bytes]):
        self.stream.seek(0)
        self.stream.truncate(sum(map(len, lines)))
        self.stream.seek(0, os.SEEK_END)
