"""Samples: the token sequences on which activations are measured and the result is judged.

Takes texts, conversations or token ids (`Lines`), returns Samples with token ids, rotary rows and
the residual stream before the first layer.

A line of a calibration file (jsonl) is one of: {"text": "..."} or {"inputs_pretokenized": "..."} (a
question), {"messages": [...]} as chat takes them, images as {"type": "image", "image": "file beside
the jsonl"}, and {"ids": [...]}, already tokenised.
"""

import hashlib
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models.checkpoint.table import WeightTable
from models.errors import ModelError
from models.prompt.messages import (
    check_messages,
    content,
    parse_content,
    plain_text,
    split_content,
    with_images,
)
from models.prompt.picture_files import FileBelow, find_below
from quant.layer_module import SampleStep, sample_step
from quant.options import CalibrationOptions
from runtime.common.errors import ToolkitError
from runtime.common.jsonl import Line, read_lines
from runtime.common.sample_questions import QUESTIONS
from runtime.common.shared_flags import media_path
from runtime.engine.sequence import Sequence
from runtime.vision import open_session

from .texts import CALIBRATION, HELD_OUT

MAX_TOKENS = 512  # of a sample; the rest is cut off


@dataclass
class Lines:
    """Lines of a calibration file: to measure activations on, and to judge the result on."""

    calibration: list[dict]
    held_out: list[dict]


@dataclass
class Sample:
    """ids int64 [T]. stream float32 [T, hidden]: token embeddings, with the features of images in
    their places."""

    ids: np.ndarray
    step: SampleStep
    stream: torch.Tensor


def choose_lines(family, options: CalibrationOptions) -> Lines:
    """Lines of --calib or the built-in ones, at most --samples of them to calibrate on."""
    if options.calib is None:
        lines = Lines(text_lines(CALIBRATION), text_lines(HELD_OUT))
        if family.vision:
            lines.calibration += image_lines()
    else:
        lines = split_lines(calibration_lines(options.calib, media_path(options)))
    return Lines(draw(lines.calibration, options.samples, options.seed), lines.held_out)


def text_lines(texts: tuple[str, ...]) -> list[dict]:
    return [{"text": text} for text in texts]


def image_lines() -> list[dict]:
    """The built-in questions about built-in images."""
    lines = []
    for question in QUESTIONS:
        if question.scene:
            message = {"role": "user", "content": content(question.text, [question.scene()])}
            lines.append({"messages": [message]})
    return lines


def calibration_lines(file: str, allowed: Path | None = None) -> list[dict]:
    """Lines of a calibration file, each with its number as "line"; images, which lie below the
    file's folder or `allowed`, are FileBelow. ToolkitError with the number of the first that is no
    calibration line."""
    lines = []
    for line in read_lines(file, "--calib"):
        try:
            lines.append(
                {**_calibration_line(line, Path(file).parent, allowed), "line": line.number}
            )
        except ModelError as error:
            raise ToolkitError(f"--calib {file}, line {line.number}: {error}") from None
    if not lines:
        raise ToolkitError(
            f"--calib {file} is empty; give a jsonl file with one text or conversation per line"
        )
    return lines


def _calibration_line(line: Line, folder: Path, allowed: Path | None) -> dict:
    """What is used of a line. ModelError if it is none."""
    if line.problem:
        raise ModelError(line.problem)
    found = line.value if isinstance(line.value, dict) else {}
    if found.get("ids") is not None:
        return {"ids": _checked_ids(found["ids"])}
    if found.get("messages") is not None:
        return {"messages": _checked_messages(found["messages"], folder, allowed)}
    text = found.get("text")
    if text is None:
        text = found.get("inputs_pretokenized")
    if not isinstance(text, str) or not text.strip():
        raise ModelError(
            'it is no calibration line; write {"text": "..."} or '
            '{"messages": [{"role": "user", "content": "..."}]}'
        )
    return {"text": plain_text(text)}


def _checked_ids(ids) -> list[int]:
    """ModelError unless they are token ids."""
    fits = isinstance(ids, list) and ids
    if not fits or not all(type(token) is int and 0 <= token < 1 << 31 for token in ids):
        raise ModelError('"ids" is not a list of token ids such as [5, 7]')
    return ids


def _checked_messages(messages, folder: Path, allowed: Path | None) -> list[dict]:
    """The messages with the files of their images. ModelError for what no chat has."""
    check_messages(messages)
    if not any(message["role"] == "user" for message in messages):
        raise ModelError("its messages ask nothing: none has the role user")
    found = []
    for message in messages:
        parts, images = parse_content(message.get("content") or "")
        files = [_image_file(image, folder, allowed) for image in images]
        found.append({**message, "content": with_images(parts, files)})
    return found


def _image_file(image, folder: Path, allowed: Path | None) -> FileBelow:
    if not isinstance(image, str):
        raise ModelError('the "image" of a part is no file name')
    return find_below(image, folder, allowed)


def draw(lines: list[dict], count: int, seed: int) -> list[dict]:
    """At most `count` lines, in their order, drawn with `seed`."""
    if count >= len(lines):
        return lines
    drawn = random.Random(seed).sample(range(len(lines)), count)
    return [lines[i] for i in sorted(drawn)]


def split_lines(lines: list[dict]) -> Lines:
    """Every fourth line is held out; of fewer than four all serve both purposes."""
    if len(lines) < 4:
        return Lines(lines, lines)
    calibration = list(lines)
    del calibration[3::4]
    return Lines(calibration, lines[3::4])


def lines_key(lines: list[dict]) -> str:
    """Digest of what the lines say and of what their images show: the same in every process."""
    return hashlib.sha256(json.dumps(_with_digests(lines)).encode()).hexdigest()


def _with_digests(value):
    """The lines with the digest of each image in its place."""
    if isinstance(value, list):
        return [_with_digests(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {}
    for key, item in value.items():
        found[key] = image_digest(item) if key == "image" else _with_digests(item)
    return found


def image_digest(image) -> str:
    """Of a FileBelow, or of the pixels of a PIL image; a file that cannot be read counts by its
    name, because opening it later says what is wrong."""
    if isinstance(image, FileBelow):
        try:
            with image.open() as stream:
                content = stream.read()
        except (OSError, ModelError):
            content = os.fsencode(image)
        return hashlib.sha256(content).hexdigest()
    form = f"{image.mode} {image.size} ".encode()
    return hashlib.sha256(form + image.tobytes()).hexdigest()


def make_samples(family, checkpoint, lines: list[dict]) -> list[Sample]:
    """Tokenise and embed; ModelError if the model cannot be asked what a line says."""
    prompts = [_numbered_tokens(family, line) for line in lines]
    table = _embedding(family, checkpoint)
    vision = None
    if any(prompt.pixels for prompt, _ in prompts):
        vision = open_session("torch", family, checkpoint, None)
    return [_sample(family, prompt, answer, table, vision) for prompt, answer in prompts]


def _numbered_tokens(family, line: dict):
    """As `_tokens`; errors name the line."""
    try:
        return _tokens(family, line)
    except ModelError as error:
        place = f"--calib, line {line['line']}: " if "line" in line else ""
        raise ModelError(f"{place}{error}") from None


def _tokens(family, line: dict):
    """(prompt, token ids of the answer that follows it)."""
    if line.get("ids"):
        return family.prompt_from_ids(line["ids"]), []
    messages = line.get("messages") or [{"role": "user", "content": line["text"]}]
    answer = []
    if messages[-1]["role"] == "assistant":
        _, text = split_content(messages[-1]["content"])
        answer = family.tokenizer.encode(text)
        messages = messages[:-1]
    return family.prompt(messages, family.languages[0]), answer


def _sample(family, prompt, answer, table, vision) -> Sample:
    ids = np.concatenate((prompt.ids, np.array(answer, dtype=np.int64)))[:MAX_TOKENS]
    num_tokens = len(ids)
    if ids.max() >= len(table) or ids.min() < 0:
        raise ModelError(f"token id {ids.max()} is outside the vocabulary of {len(table)}")
    stream = table[torch.from_numpy(ids)].float()
    for start, pixels in zip(prompt.layout.image_starts, prompt.pixels):
        features = torch.from_numpy(vision.encode_all([pixels])[0])
        stream[start : start + len(features)] = features[: max(0, num_tokens - start)]
    positions = Sequence(prompt, None).positions(0, num_tokens)[:num_tokens]
    context = min(prompt.layout.bidirectional, num_tokens)
    return Sample(ids, sample_step(family.decoder, positions, context), stream)


def _embedding(family, checkpoint) -> torch.Tensor:
    return checkpoint.tensor(WeightTable(family.weights()).source_of("embed.weight"))
