"""Messages and their content parts: images, then text."""

from models.errors import ModelError

ROLES = ("system", "user", "assistant")


def with_parts(messages: list[dict]) -> tuple[list[dict], list]:
    """Chat messages -> (the same with content as a list of parts, pictures in order). ModelError for what no chat has.

    Picture parts keep their place and become {"type": "image"}.
    """
    pictures = []
    turns = []
    for message in messages:
        if message["role"] not in ROLES:
            raise ModelError(
                f"message role {message['role']!r} is not known; use one of {', '.join(ROLES)}"
            )
        parts = message["content"]
        parts = [{"type": "text", "text": parts}] if isinstance(parts, str) else parts
        turns.append(
            {"role": message["role"], "content": [_part(part, pictures) for part in parts]}
        )
    if not turns or turns[-1]["role"] != "user":
        raise ModelError("the conversation does not end with a user message; add a question")
    return turns, pictures


def with_text(turns: list[dict]) -> list[dict]:
    """The turns of `with_parts` with their texts joined, for templates that want a plain string."""
    return [{"role": turn["role"], "content": said(turn)} for turn in turns]


def said(turn: dict) -> str:
    """The texts of one turn, joined."""
    return "".join(part.get("text", "") for part in turn["content"])


def _part(part: dict, pictures: list) -> dict:
    if part.get("type") == "image":
        pictures.append(part["image"])
        return {"type": "image"}
    if part.get("type") != "text":
        raise ModelError(
            f"content part of type {part.get('type')!r} is not known; use 'text' or 'image'"
        )
    return {"type": "text", "text": part["text"]}


def split_content(content) -> tuple[list, str]:
    """A message's content (text, or OpenAI-style parts) -> (pictures, text)."""
    if isinstance(content, str):
        return [], content
    pictures = []
    texts = []
    for part in content:
        kind = part.get("type")
        if kind == "text":
            texts.append(part["text"])
        elif kind == "image":
            pictures.append(part["image"])
        else:
            raise ModelError(f"content part of type {kind!r} is not known; use 'text' or 'image'")
    return pictures, "".join(texts)


def content(text: str, pictures=()) -> list[dict]:
    """A user message's content: pictures (path or PIL image), then text. `models.family.split_content` takes it apart."""
    return [
        *({"type": "image", "image": picture} for picture in pictures),
        {"type": "text", "text": text},
    ]
