"""The work folder of a quantisation, which lets a killed run resume.

Takes every finished layer with the residual streams after it; returns them to the run that resumes,
to the quality gate and to the output.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError

from models.checkpoint.tensor_files import load_tensors, save_tensors
from models.files import private_file
from runtime.common.files import file_entry, fresh_folder, problem_of, write_atomically
from runtime.common.notes import note

PARTIAL = ".partial"  # folder inside --out that holds everything until it is published


@dataclass
class ResidualStreams:
    """Residual streams {number of a sample: float32 [T, hidden]} between two layers, as computed by
    the float model (of the samples that are followed through it) and by the quantised model (of
    every sample)."""

    float_model: dict[int, torch.Tensor]
    quantised: dict[int, torch.Tensor]


def select(streams: dict[int, torch.Tensor], numbers: Iterable[int]) -> dict[int, torch.Tensor]:
    """The residual streams of some samples, in the order of `numbers`."""
    return {number: streams[number] for number in numbers}


def packed(streams: dict[int, torch.Tensor]) -> torch.Tensor:
    """All residual streams, one after another: float32 [sum of T, hidden]."""
    return torch.cat(list(streams.values()))


@dataclass
class FinishedLayer:
    """kinds: of every tensor. groups: names of the linear layers that become one in the runtime, by
    its name there.

    cosine, snr (dB): how close what the quantised layer adds to the residual streams of the
    held-out samples is to what the float layer adds, both fed by the float model.

    files, streams: {bytes, sha256} of the layer's files by name, and of the residual streams after
    it, as they were written.
    """

    kinds: dict[str, str]
    groups: dict[str, list[str]]
    cosine: float
    snr: float
    files: dict[str, dict] = field(default_factory=dict)
    streams: dict = field(default_factory=dict)


class WorkFolder:
    """The layers of the quantisation with this identity; a folder of another one is emptied
    first."""

    def __init__(self, folder: Path, identity: dict):
        self.folder = folder
        job = folder / "job.json"
        wanted = json.dumps(identity, sort_keys=True)
        if not job.is_file() or job.read_text(encoding="utf-8", errors="replace") != wanted:
            fresh_folder(folder)
            write_atomically(job, wanted)

    def weights(self, index: int) -> Path:
        """File of the layer's tensors as the result stores them."""
        return self.folder / f"layer-{index:04}.safetensors"

    def smoothed(self, index: int) -> Path:
        """File of the float weights that anti-outlier rescaled; absent without anti-outlier."""
        return self.folder / f"layer-{index:04}.float.safetensors"

    def layer(self, index: int) -> FinishedLayer:
        return FinishedLayer(**json.loads(self._note(index).read_text(encoding="utf-8")))

    def num_finished(self) -> int:
        """Number of layers that are complete and as they were written; 0 if the residual streams
        after the last of them are not."""
        count = 0
        while self._note(count).is_file():
            if problem := self._problem_of(count):
                note(f"layer {count} of the interrupted run is made again: {problem}")
                break
            count += 1
        return count if count and self._has_streams(count) else 0

    def _problem_of(self, index: int) -> str | None:
        """Why a layer cannot be used; None: it can."""
        names = {self.weights(index).name, self.smoothed(index).name}
        try:
            files = self.layer(index).files
            if self.weights(index).name not in files or not set(files) <= names:
                return f"{self._note(index)} names other files"
            for name, entry in files.items():
                if problem := problem_of(self.folder / name, entry, "its note"):
                    return f"{self.folder / name} {problem}"
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            return f"{self._note(index)} cannot be read ({error})"
        return None

    def _has_streams(self, index: int) -> bool:
        """Whether the residual streams before layer `index` are as they were written."""
        try:
            problem = problem_of(self._streams(index), self.layer(index - 1).streams, "its note")
        except (TypeError, KeyError):
            problem = "has no checksum"
        if problem:
            note(f"all layers are made again: {self._streams(index)} {problem}")
        return problem is None

    def save_layer(
        self,
        index: int,
        tensors: dict[str, torch.Tensor],
        smoothed: dict[str, torch.Tensor],
        finished: FinishedLayer,
        streams: ResidualStreams,
    ):
        """Write tensors, streams after the layer, and last the note that marks the layer as
        finished."""
        written = [self.weights(index)]
        store(tensors, self.weights(index))
        if smoothed:
            store(smoothed, self.smoothed(index))
            written.append(self.smoothed(index))
        self._save_streams(index + 1, streams)
        finished.files = {file.name: file_entry(file) for file in written}
        finished.streams = file_entry(self._streams(index + 1))
        write_atomically(self._note(index), json.dumps(vars(finished)))
        self._streams(index).unlink(missing_ok=True)

    def load_streams(self, index: int) -> ResidualStreams:
        """Residual streams before layer `index`, in the order of the samples."""
        streams = {"float": {}, "quantised": {}}
        for name, tensor in load_tensors(self._streams(index)).items():
            model, number = name.split(".")
            streams[model][int(number)] = tensor
        return ResidualStreams(
            dict(sorted(streams["float"].items())), dict(sorted(streams["quantised"].items()))
        )

    def _save_streams(self, index: int, streams: ResidualStreams):
        named = {}
        for number, stream in streams.float_model.items():
            named[f"float.{number}"] = stream
        for number, stream in streams.quantised.items():
            named[f"quantised.{number}"] = stream
        store(named, self._streams(index))

    def _note(self, index: int) -> Path:
        return self.folder / f"layer-{index:04}.json"

    def _streams(self, index: int) -> Path:
        return self.folder / f"streams-{index:04}.safetensors"


def store(tensors: dict[str, torch.Tensor], file: Path):
    """Write a safetensors file as transformers wants it; OSError if the disk is full or not
    writable."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    try:
        with private_file(file) as private:
            save_tensors(contiguous, private, {"format": "pt"})
            os.replace(private, file)
    except SafetensorError as error:
        raise OSError(
            f"{file} cannot be written ({error}); free some space, run the same command again to continue"
        ) from None
