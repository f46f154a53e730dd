"""The file of answers: resumed where an earlier run stopped."""

import fcntl
import hashlib
import json
import os
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from runtime.common.errors import ToolkitError


def job_of(options, engine_options, sampling) -> dict:
    """What must be the same when a run is continued, or its answers would not belong together."""
    digest = hashlib.sha256(Path(options.input).read_bytes()).hexdigest()
    return json.loads(
        json.dumps(
            {
                "input": digest,
                "model": str(Path(options.model).resolve()),
                "language": options.language,
                "batch_size": options.batch_size,
                "engine": asdict(engine_options),
                "sampling": asdict(sampling),
            }
        )
    )


class Answers:
    """The partial file: the job, then finished lines. Opened by `opened`, which holds its lock."""

    def __init__(self, out: Path, stream, job: dict):
        self.out = out
        self.partial = Path(stream.name)
        self.stream = stream
        head = (json.dumps(job) + "\n").encode()
        lines = stream.read().splitlines(keepends=True)
        if not lines or not lines[0].endswith(b"\n"):  # new, or killed within the first line
            self._cut([])
            stream.write(head)
        elif lines[0] != head:
            raise ToolkitError(
                f"{self.partial} was begun with another model, input or other options; remove it, or give "
                "another --out"
            )
        self.head = head
        self.lines = [line for line in lines[1:] if line.endswith(b"\n")]

    @property
    def count(self) -> int:
        return len(self.lines)

    def keep_whole_batches(self, batch_size: int, total: int):
        """Forget the lines of a batch that was not appended to its end."""
        whole = self.count if self.count == total else self.count // batch_size * batch_size
        self.lines = self.lines[:whole]
        self._cut([self.head, *self.lines])

    def append(self, answers: list[dict]):
        lines = [(json.dumps(answer, ensure_ascii=False) + "\n").encode() for answer in answers]
        self.stream.write(b"".join(lines))
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.lines += lines

    def publish(self) -> int:
        """The finished file under its name; returns how many lines failed."""
        from runtime.common.files import write_atomically

        write_atomically(self.out, b"".join(self.lines).decode())
        self.partial.unlink()
        return sum("error" in json.loads(line) for line in self.lines)

    def _cut(self, lines):
        self.stream.seek(0)
        self.stream.truncate(sum(map(len, lines)))
        self.stream.seek(0, os.SEEK_END)


@contextmanager
def opened(out: Path, job: dict):
    """Answers of a new or a continued run. ToolkitError if another process writes them, or a finished file is there."""
    if out.exists():
        raise ToolkitError(f"--out {out} exists already; remove it, or give another name")
    with open(out.with_name(out.name + ".partial"), "a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ToolkitError(
                f"another process is writing {stream.name}; wait for it, or give another --out"
            ) from None
        stream.seek(0)
        yield Answers(out, stream, job)
