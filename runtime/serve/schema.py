"""Bodies of requests: OpenAI's, vLLM's helpers, and the VisualGLM guide's `POST /`.

Takes JSON, returns checked requests, and from them SamplingParams. What pydantic refuses becomes an
ApiError elsewhere; `check` methods raise ApiError for what this server cannot do.
"""

import re
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from runtime.engine.options import SamplingParams
from runtime.serve.tools.schema import Tool, ToolChoice
from runtime.serve.transport.bodies import Body
from runtime.serve.transport.refusals import WrongPart, kind_of

from .errors import ApiError
from .known_fields import OF_CHATS, OF_COMPLETIONS, check_known_fields
from .messages import (
    MAX_MESSAGES,
    MAX_TOOLS,
    ImagePart,
    Message,
    Messages,
    Text,
    TextPart,
)

MAX_STOPS = 16
MAX_STOP_LENGTH = 256
HAN = re.compile(r"[\u4e00-\u9fff]")


def check_stop(stop):
    """WrongPart unless it is a text, or a list of texts."""
    if not isinstance(stop, list):
        if not isinstance(stop, str):
            raise ValueError(f"is {kind_of(stop)}; give a text or a list of texts")
        check_stop_text(stop)
        return stop
    if len(stop) > MAX_STOPS:
        raise ValueError(f"has {len(stop):,} texts; the limit is {MAX_STOPS}")
    for place, text in enumerate(stop):
        check_stop_text(text, place)
    return stop


def check_stop_text(text, *at):
    if not isinstance(text, str):
        raise WrongPart(f"is {kind_of(text)}; give a text or a list of texts", *at)
    if not text:
        raise WrongPart("is an empty text, which stands everywhere; leave it out", *at)
    if len(text) > MAX_STOP_LENGTH:
        raise WrongPart(f"has {len(text):,} characters; the limit is {MAX_STOP_LENGTH}", *at)


def check_prompt(prompt):
    """One prompt: a text, token ids, or a list that holds only one of them."""
    at = ()
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], str | list):
        if len(prompt) > 1:
            raise ValueError("has several prompts, which one request cannot have; send one")
        prompt = prompt[0]
        at = (0,)
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise ValueError(f"is {kind_of(prompt)}; give a text, or a list of token ids")
    return check_token_ids(prompt, *at)


def check_token_ids(ids, *at):
    """Ends at the first that is none: pydantic would report a million of them."""
    for place, token in enumerate(ids if isinstance(ids, list) else ()):
        if type(token) is not int:
            raise WrongPart(f"is {kind_of(token)}; give a token id, a whole number", *at, place)
        if not 0 <= token < 2**31:
            raise WrongPart("is no token id; give a whole number from 0 up", *at, place)
    return ids


def check_token_list(ids):
    return check_token_ids(ids)


def no_flag(value):
    """Python takes true for 1."""
    if isinstance(value, bool):
        raise ValueError("is true or false; give a number")
    return value


NO_FLAG = BeforeValidator(no_flag)
TokenIds = Annotated[list[int], BeforeValidator(check_token_list)]
Whole = Annotated[int, NO_FLAG]
Real = Annotated[float, NO_FLAG, Field(allow_inf_nan=False)]


class StreamOptions(Body):
    """continuous_usage_stats: vLLM's; the counts so far, in every chunk."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class SamplingRequest(Body):
    """Fields of chat and plain completions. Unknown ones are ignored; known ones that this server
    does not support are refused."""

    model_config = ConfigDict(extra="allow")
    foreign: ClassVar[dict] = {}  # fields of another endpoint
    prompt_field: ClassVar[str] = "messages"
    model: Text | None = None
    max_tokens: Annotated[Whole, Field(ge=1)] | None = None
    temperature: Annotated[Real, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Real, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=2**31)] | None = None
    repetition_penalty: Annotated[Real, Field(ge=0.01, le=100)] | None = None
    min_p: Annotated[Real, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Real, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Real, Field(ge=-2, le=2)] | None = None
    seed: Annotated[Whole, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[str | list[str] | None, BeforeValidator(check_stop)] = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=1024)] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    def check(self):
        """Raises ApiError for what this server cannot do."""
        check_known_fields(self.model_extra, self.foreign)

    @property
    def stops(self) -> list[str]:
        if isinstance(self.stop, str):
            return [self.stop]
        return self.stop or []

    @property
    def known_seed(self) -> int | None:
        """-1 asks for another answer every time, as in vLLM and llama.cpp."""
        if self.seed is None or self.seed == -1:
            return None
        return self.seed % 2**63

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens

    def sampling(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else self.top_k,  # vLLM's spelling of "all"
            repetition_penalty=self.repetition_penalty,
            seed=self.known_seed,
            ignore_eos=self.ignore_eos,
            min_p=self.min_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            stop=tuple(self.stops),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=self.num_logprobs,
        )


class ChatRequest(SamplingRequest):
    foreign = OF_COMPLETIONS
    messages: Messages
    max_completion_tokens: Annotated[Whole, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None

    def check(self):
        super().check()
        if self.top_logprobs and not self.logprobs:
            raise ApiError("top_logprobs needs logprobs: true beside it", param="top_logprobs")
        names = self.tool_names
        if isinstance(self.tool_choice, ToolChoice) and self.forced_tool not in names:
            raise ApiError(
                f"tool_choice names {self.forced_tool!r}, which is none of the tools",
                param="tool_choice",
            )
        if self.tool_choice == "required" and len(names) != 1:
            raise ApiError(
                "tool_choice 'required' is supported with exactly one tool (no constrained decoding); "
                "name the one to call, or use 'auto'",
                400,
                "unsupported_parameter",
                "tool_choice",
            )

    @property
    def offered_tools(self) -> list[dict]:
        """The tools that stand in the prompt."""
        if self.tool_choice == "none":
            return []
        return [tool.as_prompt_json() for tool in self.tools or ()]

    @property
    def tool_names(self) -> set[str]:
        return {tool["function"]["name"] for tool in self.offered_tools}

    @property
    def forced_tool(self) -> str | None:
        """The function that the answer has to call."""
        if isinstance(self.tool_choice, ToolChoice):
            return self.tool_choice.function.name
        if self.tool_choice == "required":
            return min(self.tool_names, default=None)
        return None

    @property
    def max_new_tokens(self) -> int | None:
        if self.max_completion_tokens is None:
            return self.max_tokens
        return self.max_completion_tokens

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(SamplingRequest):
    """The answer continues the prompt's text. max_tokens: with 0 there is none, for `echo`."""

    foreign = OF_CHATS
    prompt_field = "prompt"
    prompt: Annotated[Text | list[int], BeforeValidator(check_prompt)]
    max_tokens: Annotated[Whole, Field(ge=0)] = 16  # OpenAI's default
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    echo: bool = False
    add_special_tokens: bool = True  # vLLM's; False: only what the text itself says

    @property
    def max_new_tokens(self) -> int:
        """What the engine computes: one token even where none is shown."""
        return max(self.max_tokens, 1)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs

    def sampling(self) -> SamplingParams:
        prompt_logprobs = self.logprobs if self.echo else None
        return replace(super().sampling(), prompt_logprobs=prompt_logprobs, continue_text=True)


class TokenizeRequest(Body):
    model_config = ConfigDict(extra="allow")
    model: Text | None = None
    prompt: Text | None = None
    add_special_tokens: bool = True
    messages: Messages | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None

    def check(self):
        """Raises ApiError unless either prompt or messages is given, and for what is not done."""
        check_known_fields(self.model_extra, {})
        if (self.prompt is None) == (self.messages is None):
            raise ApiError("give either prompt or messages", param="prompt")

    @property
    def offered_tools(self) -> list[dict]:
        return [tool.as_prompt_json() for tool in self.tools or ()]


class DetokenizeRequest(Body):
    model: Text | None = None
    tokens: Annotated[TokenIds, Field(max_length=1_000_000)]


def as_data_uri(image: str) -> str:
    return image if image.lstrip()[:5].lower() == "data:" else f"data:;base64,{image}"


class LegacyRequest(Body):
    """The VisualGLM guide's `POST /`.

    image: base64, or a data URI. history: pairs of question and answer. max_length: tokens of
    prompt and answer together.
    """

    text: Text
    image: Text | None = None
    history: Annotated[list[tuple[Text, Text]], Field(max_length=MAX_MESSAGES // 2)] = []
    max_length: Annotated[Whole, Field(ge=1)] | None = None
    temperature: Annotated[Real, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Real, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=0, lt=2**31)] | None = None
    repetition_penalty: Annotated[Real, Field(ge=0.01, le=100)] | None = None

    @property
    def language(self) -> str:
        """The guide words the prompt in the language of the question."""
        return "zh" if HAN.search(self.text) else "en"

    def messages(self) -> list[Message]:
        """History and question; the image stands before the question."""
        messages = []
        for question, answer in self.history:
            messages.append(Message(role="user", content=question))
            messages.append(Message(role="assistant", content=answer))
        parts = [TextPart(type="text", text=self.text)]
        if self.image:
            parts.insert(0, ImagePart(type="image_url", image_url=as_data_uri(self.image)))
        return [*messages, Message(role="user", content=parts)]

    def max_new_tokens(self, prompt_tokens: int) -> int | None:
        """What max_length leaves for the answer: at least one token."""
        if self.max_length is None:
            return None
        return max(self.max_length - prompt_tokens, 1)

    def sampling(self, max_tokens: int | None) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
        )
