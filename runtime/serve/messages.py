"""Messages of a chat as clients send them.

Takes JSON, returns checked messages. What is wrong is named by its place and its own words: the
part's type, its missing text, its url.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from runtime.serve.tools.schema import ToolCall

MAX_PARTS = 1024  # of one message
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_CHARACTERS = 10_000_000
Text = Annotated[str, Field(max_length=MAX_CHARACTERS)]
# kinds of parts of other APIs -> what is meant
MEANT = {"input_text": "text", "output_text": "text", "input_image": "image_url"}
MEANT["image"] = "image_url"
PART_FORMS = "use {'type': 'text', 'text': ...} or {'type': 'image_url', 'image_url': {'url': ...}}"


class Body(BaseModel):
    """An object of a request. null is as good as a field that is left out."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given):
        if not isinstance(given, dict):
            return given
        fields = cls.model_fields
        return {
            name: value
            for name, value in given.items()
            if value is not None or (name in fields and fields[name].is_required())
        }


class TextPart(Body):
    type: Literal["text"]
    text: Text


class ImageUrl(Body):
    url: Text


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl | Text

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


def kind_of(value) -> str:
    """The JSON type of a value, as messages name it."""
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    if value is None:
        return "null"
    return names.get(type(value), "a number")


def check_content(content):
    """ValueError for content that no chat has; a part is named by its place."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"is {kind_of(content)}; give a text, or a list of parts")
    if len(content) > MAX_PARTS:
        raise ValueError(f"has {len(content):,} parts; the limit is {MAX_PARTS:,}")
    for place, part in enumerate(content):
        problem = problem_of(part)
        if problem:
            raise ValueError(f"part {place} {problem}")
    return content


def problem_of(part: Any) -> str | None:
    """What is wrong with a content part."""
    if isinstance(part, Body):
        return None
    if not isinstance(part, dict):
        return f"is {kind_of(part)}; {PART_FORMS}"
    kind = part.get("type")
    if kind is None:
        return f"has no type; {PART_FORMS}"
    if kind == "text":
        return problem_of_text("text", part.get("text"))
    if kind == "image_url":
        return problem_of_url(part.get("image_url"))
    if not isinstance(kind, str):
        return f"has {kind_of(kind)} as its type; {PART_FORMS}"
    known = f"use type '{MEANT[kind]}'" if kind in MEANT else PART_FORMS
    return f"has the type {kind[:40]!r}, which is not supported; {known}"


def problem_of_text(name: str, value) -> str | None:
    if isinstance(value, str):
        return None
    if value is None:
        return f"has no {name}: it is missing or null; give a text"
    return f"has {kind_of(value)} as its {name}; give a text"


def problem_of_url(value) -> str | None:
    """image_url is an object with a url, or the url itself."""
    if isinstance(value, str):
        return None
    if isinstance(value, dict):
        return problem_of_text("image_url.url", value.get("url"))
    if value is None:
        return "has no image_url: it is missing or null; give {'url': ...}"
    return f"has {kind_of(value)} as its image_url; give {{'url': ...}}"


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]
Content = Annotated[Text | list[ContentPart] | None, BeforeValidator(check_content)]


class Message(Body):
    role: Annotated[str, Field(max_length=64)]
    content: Content = None  # may be missing beside tool_calls
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None

    @model_validator(mode="after")
    def _check_fields(self):
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing; give a text, or a list of parts")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls stand in an assistant's message only")
        if self.role == "developer":  # OpenAI's newer name
            self.role = "system"
        return self

    @property
    def texts(self) -> list[str]:
        """All that becomes tokens."""
        arguments = [call.function.arguments for call in self.tool_calls or ()]
        if isinstance(self.content, list):
            return [part.text for part in self.content if part.type == "text"] + arguments
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
