"""The questions of a jsonl file.

Takes the file, returns one question (a dict) or error per line; and a question's chat messages.
"""

import json
from pathlib import Path

from models.prompt.messages import content
from runtime.common.errors import ToolkitError


def read_questions(path: str) -> list[dict | ToolkitError]:
    """One entry per line that is not blank; an error for a line that is no question, which then
    fails alone. ToolkitError for a file that is not UTF-8 or holds no question."""
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
    problem = problem_of(question)
    return ToolkitError(problem) if problem else question


def problem_of(question) -> str | None:
    """What keeps a JSON value from being a question."""
    if not isinstance(question, dict):
        return 'no "prompt" text'
    prompt = question.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        return 'no "prompt" text'
    history = question.get("history") or []
    if not isinstance(history, list) or not all(map(is_turn, history)):
        return '"history" is not a list of [question, answer]'
    images = question.get("image") or []
    if not isinstance(images, str) and not are_texts(images):
        return '"image" is neither a file name nor a list of them'
    return None


def is_turn(value) -> bool:
    return are_texts(value) and len(value) == 2


def are_texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def chat_messages(question: dict, folder: Path) -> list[dict]:
    """History and prompt as chat messages; the images, found in `folder`, belong to the first."""
    images = question.get("image") or []
    names = [images] if isinstance(images, str) else images
    messages = []
    for asked, answer in question.get("history") or []:
        messages.append({"role": "user", "content": asked})
        messages.append({"role": "assistant", "content": answer})
    messages.append({"role": "user", "content": question["prompt"]})
    first = messages[0]
    first["content"] = content(first["content"], [str(folder / name) for name in names])
    return messages
