"""A quantisation under way: its job, and the folder that lets it resume."""

import json
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from models.checkpoint.reader import Checkpoint
from runtime.common.files import write_atomically

from . import msmodelslim_calls as slim
from .samples import Sample

STREAMS = ("float", "quantised")
MEASURED = 5  # calibration samples on which msmodelslim measures input ranges
Streams = dict[
    str, dict[int, torch.Tensor]
]  # of each of STREAMS: number of a sample -> its residual stream


@dataclass
class Job:
    """What is to be done. samples: the first `calibrating` are measured on, the others judge the result.

    keep: linear layers that stay float from the start. ranges: max |x| / standard deviation of the linear layers' inputs,
    {} where nothing depends on them, None where msmodelslim measures them layer by layer. identity: all that decides the
    result, as text.
    """

    family: object
    checkpoint: Checkpoint
    scheme: slim.Scheme
    dtype: torch.dtype
    samples: list[Sample]
    calibrating: int
    keep: set[str]
    anti: str | None = None
    act_method: int = 3
    fraction: float = 0.01
    ranges: dict[str, float] | None = None
    identity: dict = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # that this run has spent, by what on

    @contextmanager
    def spending(self, what: str):
        start = time.perf_counter()
        yield
        self.seconds[what] = self.seconds.get(what, 0.0) + time.perf_counter() - start

    @property
    def layers(self) -> int:
        return self.family.decoder.layers

    @property
    def followed(self) -> list[int]:
        """Samples that are taken through the float model too: those that judge, and those whose float inputs are needed."""
        used = self.calibrating if self.anti else MEASURED if self.ranges is None else 0
        return [*range(min(used, self.calibrating)), *range(self.calibrating, len(self.samples))]


@dataclass
class Record:
    """A finished layer: tensor kinds; linear layers per group; cosine and signal-to-noise ratio (dB) of what it adds to the
    residual streams of the held-out samples, fed as the float model feeds it."""

    kinds: dict[str, str]
    groups: dict[str, list[str]]
    cosine: float
    snr: float


class Work:
    """The work folder of one job; a folder of another job is emptied first."""

    def __init__(self, folder: Path, job: Job):
        self.folder = folder
        note = folder / "job.json"
        wanted = json.dumps(job.identity, sort_keys=True)
        if not note.is_file() or note.read_text(encoding="utf-8") != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_atomically(note, wanted)

    def weights(self, index: int) -> Path:
        return self.folder / f"layer-{index:04}.safetensors"

    def floats(self, index: int) -> Path:
        """Float weights that anti-outlier changed."""
        return self.folder / f"layer-{index:04}.float.safetensors"

    def record(self, index: int) -> Record:
        return Record(**json.loads(self._note(index).read_text(encoding="utf-8")))

    def finished(self) -> int:
        """Number of layers that are complete, the streams behind them too."""
        done = 0
        while self._note(done).is_file():
            done += 1
        return done if self._streams(done).is_file() else 0

    def keep(self, index: int, tensors: dict, floats: dict, record: Record, streams: Streams):
        """Tensors, streams behind the layer, then the note that says it is finished."""
        store(tensors, self.weights(index))
        if floats:
            store(floats, self.floats(index))
        self.save_streams(index + 1, streams)
        write_atomically(self._note(index), json.dumps(vars(record)))
        self._streams(index).unlink(missing_ok=True)

    def save_streams(self, index: int, streams: Streams):
        part = self._streams(index).with_suffix(".part")
        store({f"{kind}.{i}": t for kind in STREAMS for i, t in streams[kind].items()}, part)
        part.replace(self._streams(index))

    def load_streams(self, index: int) -> Streams:
        streams = {kind: {} for kind in STREAMS}
        for name, tensor in load_file(self._streams(index)).items():
            kind, number = name.split(".")
            streams[kind][int(number)] = tensor
        return streams

    def _note(self, index):
        return self.folder / f"layer-{index:04}.json"

    def _streams(self, index):
        return self.folder / f"streams-{index:04}.safetensors"


def store(tensors: dict[str, torch.Tensor], file: Path):
    """A safetensors file as transformers wants it; OSError where the disk is full or may not be written."""
    try:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"}
        )
    except SafetensorError as error:
        raise OSError(
            f"{file} cannot be written ({error}); free some space, run the same command again to continue"
        ) from None
