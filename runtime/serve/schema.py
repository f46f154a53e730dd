"""What the service reads and writes: OpenAI's requests, answers, chunks and errors."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from runtime.engine.options import SamplingParams

from .errors import ApiError
from .tool_calls import MAX_TOOLS, Choice, Tool, ToolCall

MAX_STOPS, MAX_STOP_LENGTH = 16, 256
# Fields that are accepted only with the values that change nothing.
NEUTRAL = {
    "n": (1,),
    "best_of": (1,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "echo": (False,),
    "suffix": ("",),
    "modalities": (["text"],),
    "audio": (),
    "skip_special_tokens": (True,),
    "prompt_logprobs": (0,),
    "use_beam_search": (False,),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "web_search_options": (),
}
Text = Annotated[str, Field(max_length=10_000_000)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class TextPart(BaseModel):
    type: Literal["text"]
    text: Text


class ImageUrl(BaseModel):
    url: Text


class ImagePart(BaseModel):
    type: Literal["image_url"]
    image_url: ImageUrl | Text

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class Message(BaseModel):
    role: Annotated[str, Field(max_length=64)]
    content: Text | list[Part] | None = None  # may be missing beside tool_calls
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS)] | None = None

    @model_validator(mode="after")
    def _says_something(self):
        if self.content is None and not self.tool_calls:
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls stand in an assistant's message only")
        return self

    @property
    def texts(self) -> list[str]:
        """All that becomes tokens."""
        parts = (
            [self.content or ""]
            if not isinstance(self.content, list)
            else [part.text for part in self.content if part.type == "text"]
        )
        return [*parts, *(call.function.arguments for call in self.tool_calls or ())]

    @property
    def pictures(self) -> int:
        return (
            sum(part.type == "image_url" for part in self.content)
            if isinstance(self.content, list)
            else 0
        )


class StreamOptions(BaseModel):
    include_usage: bool = False


class SamplingRequest(BaseModel):
    """Fields of chat and plain completions. Unknown ones are ignored, known ones we cannot serve are refused."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    def check(self):
        """Raises ApiError for what this server cannot do."""
        for name, value in (self.model_extra or {}).items():
            if name in NEUTRAL and value is not None and value not in NEUTRAL[name]:
                allowed = " or ".join(map(repr, NEUTRAL[name]))
                hint = f"; leave it out, or give {allowed}" if allowed else "; leave it out"
                raise ApiError(
                    f"{name} is not supported by this server{hint}",
                    400,
                    "unsupported_parameter",
                    name,
                )
        if len(self.stops) > MAX_STOPS or any(
            not 0 < len(stop) <= MAX_STOP_LENGTH for stop in self.stops
        ):
            raise ApiError(
                f"stop takes up to {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters",
                param="stop",
            )

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self) -> SamplingParams:
        top_k = 0 if self.top_k == -1 else self.top_k  # vLLM's spelling of "all"
        return SamplingParams(
            max_tokens=self.longest,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            ignore_eos=self.ignore_eos,
            min_p=self.min_p or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            stop=tuple(self.stops),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=self.likeliest,
        )

    @property
    def longest(self) -> int | None:
        return self.max_tokens


class ChatRequest(SamplingRequest):
    messages: Annotated[list[Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | Choice | None = None

    def check(self):
        super().check()
        named = self.tool_choice.function.name if isinstance(self.tool_choice, Choice) else None
        if named and named not in self.names:
            raise ApiError(
                f"tool_choice names {named!r}, which is none of the tools", param="tool_choice"
            )
        if self.tool_choice == "required" and len(self.names) != 1:
            raise ApiError(
                "tool_choice 'required' needs exactly one tool, for nothing here keeps a model to several; name "
                "the one to call, or use 'auto'",
                400,
                "unsupported_parameter",
                "tool_choice",
            )

    @property
    def offered(self) -> list[dict]:
        """Tools that the model is told of."""
        return [] if self.tool_choice == "none" else [tool.told() for tool in self.tools or ()]

    @property
    def names(self) -> set[str]:
        return {tool["function"]["name"] for tool in self.offered}

    @property
    def forced(self) -> str | None:
        """The function that the answer has to call."""
        if isinstance(self.tool_choice, Choice):
            return self.tool_choice.function.name
        return min(self.names, default=None) if self.tool_choice == "required" else None

    @property
    def longest(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def likeliest(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingRequest):
    prompt: Text | list[TokenId] | list[Text]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16  # OpenAI's default
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @property
    def likeliest(self) -> int | None:
        return self.logprobs


class TokenizeRequest(BaseModel):
    prompt: Text | None = None
    messages: list[Message] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None


class DetokenizeRequest(BaseModel):
    tokens: Annotated[list[TokenId], Field(max_length=1_000_000)]


class LegacyRequest(BaseModel):
    """The VisualGLM guide's `POST /`: image is base64 without a prefix, history pairs of question and answer."""

    text: Text
    image: Text | None = None
    history: list[tuple[Text, Text]] = []
    max_length: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
