"""Messages of a chat and their content parts.

Takes messages whose content is a text or OpenAI-style parts; returns turns whose content is a list
of parts, and the images beside them, in order.
"""

from models.errors import ModelError

CHAT_ROLES = ("system", "user", "assistant")


def parse_messages(messages: list[dict]) -> tuple[list[dict], list]:
    """Chat messages -> (turns {"role", "content": parts}, images in order).

    ModelError for a role or content part that no chat has, and unless the user speaks last.
    """
    turns = []
    images = []
    for message in messages:
        if message["role"] not in CHAT_ROLES:
            raise ModelError(
                f"message role {message['role']!r} is not known; use one of {', '.join(CHAT_ROLES)}"
            )
        parts, new_images = parse_content(message["content"])
        turns.append({"role": message["role"], "content": parts})
        images += new_images
    if not turns or turns[-1]["role"] != "user":
        raise ModelError("the conversation does not end with a user message; add a question")
    return turns, images


def parse_content(content: str | list[dict]) -> tuple[list[dict], list]:
    """A message's content -> (its parts, the images in order).

    An image part becomes {"type": "image"} in its place. ModelError for other kinds of parts.
    """
    if isinstance(content, str):
        return [{"type": "text", "text": content}], []
    parts = []
    images = []
    for part in content:
        kind = part.get("type")
        if kind == "text":
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image":
            parts.append({"type": "image"})
            images.append(part["image"])
        else:
            raise ModelError(f"content part of type {kind!r} is not known; use 'text' or 'image'")
    return parts, images


def split_content(content: str | list[dict]) -> tuple[list, str]:
    """A message's content -> (images in order, its texts joined)."""
    parts, images = parse_content(content)
    return images, joined_text(parts)


def joined_text(parts: list[dict]) -> str:
    """The texts of content parts, joined without anything between them."""
    return "".join(part["text"] for part in parts if part["type"] == "text")


def with_plain_text(turns: list[dict]) -> list[dict]:
    """Turns with their texts joined, for templates that want a string; images are left out."""
    return [{"role": turn["role"], "content": joined_text(turn["content"])} for turn in turns]


def content(text: str, images=()) -> list[dict]:
    """A user message's content: images (path, bytes or PIL image), then text."""
    parts = [{"type": "image", "image": image} for image in images]
    return [*parts, {"type": "text", "text": text}]
