"""Samples: what activations are measured on. Texts, conversations or ids flow in; token ids, rotary rows and the residual
stream in front of the first layer flow out.

A line of a calibration file (jsonl) is one of: {"text": "..."} or {"inputs_pretokenized": "..."} (a question),
{"messages": [...]} as chat takes them, pictures as {"type": "image", "image": "file beside the jsonl"}, and
{"ids": [...]}, already tokenised.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from models.checkpoint.table import WeightTable
from models.errors import ModelError
from runtime.common.errors import ToolkitError
from runtime.engine.sequence import Sequence

from .layer_module import SampleStep, sample_step
from .sample_texts import CALIBRATION, HELD_OUT

LONGEST = 512  # tokens of a sample; what is behind is cut off


@dataclass
class Sample:
    """`stream` float32 [T, hidden]: token embeddings and picture rows."""

    ids: np.ndarray
    step: SampleStep
    stream: torch.Tensor


def default_lines(family, texts) -> list[dict]:
    """The built-in texts; models with pictures get the built-in pictures too."""
    from models.prompt.messages import content
    from runtime.common.sample_questions import QUESTIONS

    lines = [{"text": text} for text in texts]
    scenes = [q for q in QUESTIONS if q.scene] if family.vision and texts is CALIBRATION else []
    return lines + [
        {"messages": [{"role": "user", "content": content(q.text, [q.scene()])}]} for q in scenes
    ]


def read_lines(file: str) -> list[dict]:
    """Lines of a calibration file; ToolkitError with the number of a line that is none."""
    lines = []
    try:
        texts = Path(file).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ToolkitError(
            f"--calib {file} is not UTF-8 (byte {error.start}); convert it first, e.g. with iconv -f GBK -t "
            "UTF-8"
        ) from None
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if not _is_line(line):
            raise ToolkitError(
                f'--calib {file}, line {number}, is no calibration line; write {{"text": "..."}} or '
                '{"messages": [{"role": "user", "content": "..."}]}'
            )
        lines.append(_with_paths(line, Path(file).parent))
    if not lines:
        raise ToolkitError(
            f"--calib {file} is empty; give a jsonl file with one text or conversation per line"
        )
    return lines


def _is_line(line) -> bool:
    if not isinstance(line, dict):
        return False
    if (ids := line.get("ids")) is not None:
        return (
            isinstance(ids, list)
            and bool(ids)
            and all(type(i) is int and 0 <= i < 1 << 31 for i in ids)
        )
    if (messages := line.get("messages")) is not None:
        return (
            isinstance(messages, list)
            and all(
                isinstance(m, dict) and isinstance(m.get("content"), (str, list)) for m in messages
            )
            and any(m.get("role") == "user" for m in messages)
        )
    return isinstance(line.get("text", line.get("inputs_pretokenized")), str)


def choose(lines: list[dict], count: int, seed: int) -> list[dict]:
    """At most `count` lines, in their order, drawn with `seed`."""
    if count >= len(lines):
        return lines
    return [lines[i] for i in sorted(random.Random(seed).sample(range(len(lines)), count))]


def held_out_lines(family, lines: list[dict], calib: str | None) -> tuple[list[dict], list[dict]]:
    """(lines to calibrate on, lines to judge on). A file's every fourth line is held out, if it has that many."""
    if calib is None:
        return lines, default_lines(family, HELD_OUT)
    return (
        ([line for i, line in enumerate(lines) if i % 4 != 3], lines[3::4])
        if len(lines) >= 4
        else (lines, lines)
    )


def make_samples(family, checkpoint, lines: list[dict]) -> list[Sample]:
    """Tokenise and embed; ModelError if a line is nothing the model can be asked."""
    prompts = [_tokens(family, line) for line in lines]
    table = _embedding(family, checkpoint)
    vision = _vision(family, checkpoint) if any(prompt.pixels for prompt, _ in prompts) else None
    return [_sample(family, prompt, answer, table, vision) for prompt, answer in prompts]


def _with_paths(value, folder: Path):
    """The line with picture files found beside the jsonl file."""
    if isinstance(value, list):
        return [_with_paths(item, folder) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: str(folder / item) if key == "image" else _with_paths(item, folder)
        for key, item in value.items()
    }


def _tokens(family, line: dict):
    """(prompt, ids of the answer that follows it)."""
    if line.get("ids"):
        return family.prompt_from_ids(line["ids"]), []
    text = line.get("text", line.get("inputs_pretokenized"))
    messages = line.get("messages") or [{"role": "user", "content": text}]
    answer = []
    if messages[-1]["role"] == "assistant":
        answer = family.tokenizer.encode(messages[-1]["content"])
        messages = messages[:-1]
    return family.prompt(messages, family.languages[0]), answer


def _sample(family, prompt, answer, table, vision) -> Sample:
    ids = np.concatenate((prompt.ids, np.array(answer, dtype=np.int64)))[:LONGEST]
    if ids.max() >= len(table) or ids.min() < 0:
        raise ModelError(f"token id {ids.max()} is outside the vocabulary of {len(table)}")
    stream = table[torch.from_numpy(ids)].float()
    for start, pixels in zip(prompt.layout.image_starts, prompt.pixels):
        rows = torch.from_numpy(vision.encode(pixels)[0])
        stream[start : start + len(rows)] = rows[: max(0, len(ids) - start)]
    positions = Sequence(prompt, None).positions(0, len(ids))[: len(ids)]
    return Sample(
        ids,
        sample_step(family.decoder, positions, min(prompt.layout.bidirectional, len(ids))),
        stream,
    )


def _embedding(family, checkpoint) -> torch.Tensor:
    return checkpoint.tensor(WeightTable(family.weights()).source_of("embed.weight"))


def _vision(family, checkpoint):
    from runtime.vision import open_session

    return open_session("torch", family, checkpoint, None)
