"""Messages of a chat as clients send them.

Takes JSON, returns checked messages. What is wrong is named by its place: the part's type, its
missing text, its url.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from runtime.serve.tools.schema import ToolCall
from runtime.serve.transport.bodies import Body
from runtime.serve.transport.refusals import WrongPart, kind_of

MAX_PARTS = 1024  # of one message
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_CHARACTERS = 10_000_000
Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
# kinds of parts of other APIs -> what is meant
MEANT = {"input_text": "text", "output_text": "text", "input_image": "image_url"}
MEANT["image"] = "image_url"
TEXT_PARTS = ("text", "refusal")
# OpenAI's, and GLM-4's name for what a tool gave
ROLES = ("system", "developer", "user", "assistant", "tool", "observation")
PART_FORMS = "use {'type': 'text', 'text': ...} or {'type': 'image_url', 'image_url': {'url': ...}}"


class TextPart(Body):
    type: Literal["text"]
    text: Text


class RefusalPart(Body):
    """Of an assistant's message, as OpenAI's models refuse."""

    type: Literal["refusal"]
    refusal: Text

    @property
    def text(self) -> str:
        return self.refusal


class ImageUrl(Body):
    url: Text


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl | Text

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


def check_content(content):
    """WrongPart for content that no chat has."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"is {kind_of(content)}; give a text, or a list of parts")
    if len(content) > MAX_PARTS:
        raise ValueError(f"has {len(content):,} parts; the limit is {MAX_PARTS:,}")
    for place, part in enumerate(content):
        if not isinstance(part, Body):
            check_part(part, place)
    return content


def check_part(part: Any, place: int):
    if not isinstance(part, dict):
        raise WrongPart(f"is {kind_of(part)}; {PART_FORMS}", place)
    kind = part.get("type")
    if kind is None:
        raise WrongPart(f"has no type; {PART_FORMS}", place)
    if not isinstance(kind, str):
        raise WrongPart(f"is {kind_of(kind)}; {PART_FORMS}", place, "type")
    if kind == "image_url":
        return check_url(part.get("image_url"), place)
    if kind not in TEXT_PARTS:
        known = f"use type '{MEANT[kind]}'" if kind in MEANT else PART_FORMS
        said = f"has the type {kind[:40]!r}, which is not supported; {known}"
        raise WrongPart(said, place)
    check_text(part.get(kind), place, kind)


def check_url(value, place: int):
    """image_url is an object with a url, or the url itself."""
    if isinstance(value, dict):
        check_text(value.get("url"), place, "image_url", "url")
    elif value is None:
        raise WrongPart("has no image_url: it is missing or null; give {'url': ...}", place)
    elif not isinstance(value, str):
        raise WrongPart(f"is {kind_of(value)}; give {{'url': ...}}", place, "image_url")


def check_text(value, *at):
    if value is None:
        raise WrongPart("is missing or null; give a text", *at)
    if not isinstance(value, str):
        raise WrongPart(f"is {kind_of(value)}; give a text", *at)


ContentPart = Annotated[TextPart | RefusalPart | ImagePart, Field(discriminator="type")]
Content = Annotated[Text | list[ContentPart] | None, BeforeValidator(check_content)]


def check_role(role):
    if isinstance(role, str) and role not in ROLES:
        raise ValueError(f"is {role[:40]!r}, which is not known; use one of {', '.join(ROLES[:5])}")
    return role


class Message(Body):
    """content may be missing but in what the user says: tools and others may have said nothing."""

    role: Annotated[str, BeforeValidator(check_role)]
    content: Content = None
    refusal: Text | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None

    @model_validator(mode="after")
    def _check_fields(self):
        if self.role == "developer":  # OpenAI's newer name
            self.role = "system"
        if self.content is None:
            self.content = self.refusal
        if self.tool_calls and self.role != "assistant":
            raise ValueError("has tool_calls, which stand in an assistant's message only")
        if self.content is None and self.role in ("user", "observation"):
            raise ValueError("has no content; give a text, or a list of parts")
        return self

    @property
    def texts(self) -> list[str]:
        """All that becomes tokens."""
        arguments = [call.function.arguments for call in self.tool_calls or ()]
        if isinstance(self.content, list):
            return [part.text for part in self.content if part.type != "image_url"] + arguments
        return [self.content or "", *arguments]

    @property
    def num_images(self) -> int:
        if not isinstance(self.content, list):
            return 0
        return sum(part.type == "image_url" for part in self.content)

    @property
    def says_nothing(self) -> bool:
        return not (self.num_images or self.tool_calls or any(self.texts))


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
