"""Messages of a chat and their content parts.

Takes messages whose content is a text or OpenAI-style parts; returns turns whose content is a list
of parts, and the images beside them, in order.
"""

from models.errors import ModelError

CHAT_ROLES = ("system", "user", "assistant")


def check_messages(messages):
    """ModelError unless each message is a dict with a role and a content that `parse_content`
    takes; which roles there are and who may speak last, the family knows."""
    if not isinstance(messages, (list, tuple)):
        raise ModelError(f"messages are a list of dicts, not {_kind(messages)}")
    for number, message in enumerate(messages, 1):
        problem = _problem_of(message)
        if problem:
            raise ModelError(
                f"message {number} {problem}; write "
                '{"role": "user", "content": "text or a list of parts"}'
            )
        if message.get("content") is not None:
            parse_content(message["content"])


def check_tools(tools):
    """ModelError unless each tool has a type, and a function a name, as OpenAI describes them; which
    other types there are, the template knows."""
    if not isinstance(tools, (list, tuple)):
        raise ModelError(f"tools are a list of dicts, not {_kind(tools)}")
    for number, tool in enumerate(tools, 1):
        kind = tool.get("type") if isinstance(tool, dict) else None
        function = tool.get("function") if kind == "function" else {"name": kind}
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ModelError(
                f"tool {number} is no function with a name; give functions: "
                '{"type": "function", "function": {"name": ..., "description": ..., "parameters": ...}}'
            )


def _problem_of(message) -> str | None:
    if not isinstance(message, dict):
        return f"is {_kind(message)}, not a dict"
    if not isinstance(message.get("role"), str):
        return "has no role"
    if message.get("content") is None and not message.get("tool_calls"):
        return "has no content"
    if not isinstance(message.get("metadata") or "", str):
        return "has metadata that is no text"
    if not _are_calls(message.get("tool_calls") or []):
        return 'has tool_calls that are not [{"function": {"name": "...", "arguments": "{}"}}]'
    return None


def _are_calls(calls) -> bool:
    """Whether every call has a function with a name and arguments, both texts."""
    if not isinstance(calls, (list, tuple)):
        return False
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            return False
        if not isinstance(function.get("name"), str):
            return False
        if not isinstance(function.get("arguments"), str):
            return False
    return True


def _kind(value) -> str:
    return f"of type {type(value).__name__}"


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
        parts, new_images = parse_content(said(message))
        turns.append({"role": message["role"], "content": parts})
        images += new_images
    if not turns or turns[-1]["role"] != "user":
        raise ModelError("the conversation does not end with a user message; add a question")
    return turns, images


def said(message: dict):
    """The content of a message; ModelError for one that only calls tools."""
    if message.get("content") is None:
        raise ModelError(
            "a message without content calls tools, which this model's prompts have no place for; "
            "leave it out"
        )
    return message["content"]


def parse_content(content: str | list[dict]) -> tuple[list[dict], list]:
    """A message's content -> (its parts, the images in order).

    An image part becomes {"type": "image"} in its place. Half a surrogate pair in a text, which
    UTF-8 does not have, becomes U+FFFD. ModelError for other kinds of parts.
    """
    if isinstance(content, str):
        return [{"type": "text", "text": plain_text(content)}], []
    if not isinstance(content, (list, tuple)):
        raise ModelError(f"content is a text or a list of parts, not {_kind(content)}")
    parts = []
    images = []
    for part in content:
        kind, value = _part(part)
        if kind == "text":
            parts.append({"type": "text", "text": plain_text(value)})
        else:
            parts.append({"type": "image"})
            images.append(value)
    return parts, images


def _part(part) -> tuple[str, object]:
    """(kind, value) of a content part."""
    if not isinstance(part, dict):
        raise ModelError(
            f'a content part is {_kind(part)}, not a dict such as {{"type": "text", "text": "..."}}'
        )
    kind = part.get("type")
    if kind not in ("text", "image"):
        raise ModelError(f"content part of type {kind!r} is not known; use 'text' or 'image'")
    value = part.get(kind)
    if value is None or (kind == "text" and not isinstance(value, str)):
        raise ModelError(f'a content part of type {kind!r} has no {kind} under the key "{kind}"')
    return kind, value


def plain_text(text: str) -> str:
    """The text with U+FFFD in place of half a surrogate pair, and whole pairs as characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


def split_content(content: str | list[dict]) -> tuple[list, str]:
    """A message's content -> (images in order, its texts joined)."""
    parts, images = parse_content(content)
    return images, joined_text(parts)


def joined_text(parts: list[dict]) -> str:
    """The texts of content parts, joined without anything between them."""
    return "".join(part["text"] for part in parts if part["type"] == "text")


def with_images(parts: list[dict], images: list) -> list[dict]:
    """The parts of `parse_content` with the images in their places, in order."""
    rest = iter(images)
    found = []
    for part in parts:
        found.append({**part, "image": next(rest)} if part["type"] == "image" else part)
    return found


def with_plain_text(turns: list[dict], image_mark: str = "") -> list[dict]:
    """Turns with their texts joined, for templates that want a string.

    image_mark: what stands in front of a turn's text for each of its images.
    """
    plain = []
    for turn in turns:
        images = sum(part["type"] == "image" for part in turn["content"])
        text = image_mark * images + joined_text(turn["content"])
        plain.append({"role": turn["role"], "content": text})
    return plain


def content(text: str, images=()) -> list[dict]:
    """A user message's content: images (path, bytes or PIL image), then text."""
    parts = [{"type": "image", "image": image} for image in images]
    return [*parts, {"type": "text", "text": text}]
