"""The questions of a jsonl file.

Takes the file, returns one question (a dict) or BadLine per line; and a question's chat messages.
"""

from pathlib import Path

from models.prompt.messages import content
from models.prompt.picture_files import find_below
from runtime.common.errors import ToolkitError
from runtime.common.jsonl import Line, read_lines


class BadLine(ToolkitError):
    """A line that is no question. line: its number. fields: what it holds all the same, such as its
    id."""

    def __init__(self, message: str, line: int = 0, fields: dict | None = None):
        super().__init__(message)
        self.line = line
        self.fields = fields or {}


def read_questions(path: str, name: str = "--input") -> list[dict | BadLine]:
    """One entry per line that is not blank; an error for a line that is no question, which then
    fails alone. ToolkitError for a file that is not UTF-8 or holds no question; name: of the flag
    that gave it."""
    found = [read_question(line) for line in read_lines(path, name)]
    if not found:
        raise ToolkitError(
            f"{name} {path} holds no questions; write one JSON object per line, e.g. "
            '{"prompt": "Describe the picture.", "image": "a.png"}'
        )
    return found


def read_question(line: Line) -> dict | BadLine:
    if line.problem:
        return BadLine(line.problem, line.number, line.value)
    if not isinstance(line.value, dict):
        return BadLine('no "prompt" text: the line is no JSON object', line.number)
    problem = problem_of(line.value)
    return BadLine(problem, line.number, line.value) if problem else line.value


def problem_of(question: dict) -> str | None:
    """What keeps a JSON object from being a question. null and "" stand for a field left out."""
    prompt = question.get("prompt")
    if not isinstance(prompt, str | None):
        return 'no "prompt" text: what stands there is not a text'
    if not prompt or not prompt.strip():
        return 'no "prompt" text'
    history = optional(question, "history", [])
    if not isinstance(history, list) or not all(map(is_turn, history)):
        return '"history" is not a list of [question, answer]'
    images = optional(question, "image", [])
    if not isinstance(images, str) and not are_texts(images):
        return '"image" is neither a file name nor a list of them'
    for name in ("language", "lang"):
        if not isinstance(optional(question, name, ""), str):
            return f'"{name}" is not a text such as "en"'
    return None


def optional(question: dict, name: str, default):
    """The field's value, or `default` for one that is absent, null or empty text."""
    value = question.get(name)
    return default if value is None or value == "" else value


def is_turn(value) -> bool:
    return are_texts(value) and len(value) == 2


def are_texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def chat_messages(question: dict, folder: Path, allowed: Path | None = None) -> list[dict]:
    """History and prompt as chat messages; the images belong to the first.

    folder: of the jsonl file, to which names of images are relative. allowed: another folder in
    which they may lie. ModelError for an image elsewhere.
    """
    images = optional(question, "image", [])
    names = [images] if isinstance(images, str) else images
    messages = []
    for asked, answer in optional(question, "history", []):
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": question["prompt"]})
    first = messages[0]
    files = [find_below(name, folder, allowed) for name in names]
    first["content"] = content(first["content"], files)
    return messages
