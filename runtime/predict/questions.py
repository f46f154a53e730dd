"""Reads the questions of a jsonl file."""

import json
from pathlib import Path

from runtime.common.errors import ToolkitError


def read_questions(path: str) -> list[dict | ToolkitError]:
    """One entry per line that is not blank; an error for a line that is no question, which then fails alone."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ToolkitError(f"--input {path} is not UTF-8 text; save it as UTF-8 jsonl") from None
    found = [read_question(line) for line in lines if line.strip()]
    if not found:
        raise ToolkitError(
            f"--input {path} holds no questions; write one JSON object per line, e.g. "
            '{"prompt": "Describe the picture.", "image": "a.png"}'
        )
    return found


def read_question(line: str) -> dict | ToolkitError:
    try:
        question = json.loads(line)
    except ValueError as error:
        return ToolkitError(f"no JSON ({error})")
    if (
        not isinstance(question, dict)
        or not isinstance(question.get("prompt"), str)
        or not question["prompt"].strip()
    ):
        return ToolkitError('no "prompt" text')
    history = question.get("history") or []
    if not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn)
        for turn in history
    ):
        return ToolkitError('"history" is not a list of [question, answer]')
    images = question.get("image") or []
    if not isinstance(images, str) and not all(isinstance(image, str) for image in images):
        return ToolkitError('"image" is neither a file name nor a list of them')
    return question
