"""Builds the prompts of requests.

Takes messages, text or token ids, returns what `Engine.add` takes; ApiError for more than the model
or the operator allows. Runs in the few threads that read prompts and images.
"""

import json
from contextlib import contextmanager

from models.errors import ModelError, UserError

from .engine_thread import EngineThread
from .errors import ApiError, as_api_error
from .images import ImageRules
from .messages import Message
from .schema import CompletionRequest, LegacyRequest

MAX_TOKEN_CHARACTERS = 128  # no token of any vocabulary is longer


class PromptBuilder:
    """engine_thread: has loaded its engine when a prompt is built. language: wording of the prompt
    around the question, where the request names none."""

    def __init__(self, engine_thread: EngineThread, rules: ImageRules, language: str | None = None):
        self._engine_thread = engine_thread
        self._rules = rules
        self._language = language

    @property
    def _engine(self):
        return self._engine_thread.engine

    def chat(
        self,
        messages: list[Message],
        language: str | None = None,
        tools: list[dict] | None = None,
        forced: str | None = None,
        picture_place: str | None = None,
    ):
        """tools: descriptions of functions. forced: the one that the answer has to call.
        picture_place: where the request has its picture, if not in a message."""
        tools = tools or []
        self._check_tools(messages, tools)
        self._check_image_count(messages)
        text_characters = sum(len(text) for message in messages for text in message.texts)
        tool_characters = len(json.dumps(tools, ensure_ascii=False))
        self._check_characters(text_characters + tool_characters)
        silent = self._leaves_out_empty_system(messages)
        turns = []
        for place, message in enumerate(messages):
            if not (silent and is_empty_system(message)):
                turns.append(self._as_chat_message(message, place, picture_place))
        if forced:
            turns.append({"role": "assistant", "metadata": forced, "content": ""})
        with errors_about("messages"):
            return self._engine.prompt(turns, language or self._language, tools or None)

    def legacy(self, request: LegacyRequest):
        """Worded in the language of the question, where the family has that wording."""
        languages = self._engine.family.languages
        language = request.language if request.language in languages else None
        return self.chat(request.messages(), language, picture_place="image")

    def completion(self, request: CompletionRequest):
        """A prompt without a chat's frame, with its text where the answer repeats it."""
        given = request.prompt
        if not given:
            raise ApiError("the prompt is empty", param="prompt")
        family = self._engine.family
        if request.echo and request.logprobs is not None and family.prefix_lm:
            raise ApiError(
                f"echo with logprobs is not supported: {family.name} reads its prompt in both "
                "directions, so that the prompt's tokens have no probabilities",
                400,
                "unsupported_parameter",
                "echo",
            )
        with errors_about("prompt"):
            ids = given
            if isinstance(given, str):
                ids = self.token_ids(given, request.add_special_tokens, "prompt")
            self.check_length(len(ids), None, "prompt")
            prompt = self._engine.prompt_from_ids(ids)
        if request.echo:
            prompt.text = given if isinstance(given, str) else family.tokenizer.decode(ids)
        return prompt

    def token_ids(self, text: str, special: bool = True, param: str = "messages") -> list[int]:
        self._check_characters(len(text), param)
        return self._engine.family.text_ids(text, special)

    def text_of(self, ids: list[int]) -> str:
        family = self._engine.family
        beyond = [token for token in ids if token >= family.decoder.vocab_size]
        if beyond:
            raise ApiError(
                f"token id {beyond[0]} is outside the vocabulary of {family.decoder.vocab_size}",
                param="tokens",
            )
        return family.tokenizer.decode(ids)

    def check_length(self, prompt_tokens: int, max_new_tokens: int | None, param: str = "messages"):
        longest = self._engine.max_model_len
        new = max_new_tokens or 1
        if prompt_tokens + new > longest:
            raise ApiError(
                f"the model's maximum context length is {longest} tokens; the prompt has "
                f"{prompt_tokens} and {new} more were asked for",
                code="context_length_exceeded",
                param=param,
            )

    def _check_characters(self, characters: int, param: str = "messages"):
        """No token is longer than 128 characters, so text above this cannot fit; refuse before
        tokenising."""
        longest = self._engine.max_model_len
        if characters > MAX_TOKEN_CHARACTERS * longest:
            raise ApiError(
                f"{characters:,} characters exceed the model's maximum context length of "
                f"{longest} tokens",
                code="context_length_exceeded",
                param=param,
            )

    def _check_tools(self, messages: list[Message], tools: list[dict]):
        family = self._engine.family
        if family.takes_tools:
            return
        if tools or any(message.tool_calls or message.role == "tool" for message in messages):
            raise ApiError(
                f"tools are not supported: this server's model, {family.name}, knows none; leave "
                "out tools, tool_calls and tool messages",
                400,
                "unsupported_parameter",
                "tools",
            )

    def _check_image_count(self, messages: list[Message]):
        count = sum(message.num_images for message in messages)
        if count > self._rules.max_images:
            raise ApiError(
                f"{count} pictures in one request, the limit is {self._rules.max_images}",
                param="messages",
            )

    def _leaves_out_empty_system(self, messages: list[Message]) -> bool:
        """Whether there are empty system messages, and the model knows no system message."""
        return any(map(is_empty_system, messages)) and not takes_system(self._engine.family)

    def _as_chat_message(self, message: Message, place: int, picture_place: str | None) -> dict:
        chat_message = {"role": message.role, "content": message.content or ""}
        if isinstance(message.content, list):
            parts = []
            for number, part in enumerate(message.content):
                of_part = f"messages[{place}].content[{number}].image_url.url"
                parts.append(self._as_chat_part(part, picture_place or of_part))
            chat_message["content"] = parts
        if message.tool_calls:
            chat_message["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        return chat_message

    def _as_chat_part(self, part, place: str) -> dict:
        """place: of its picture, for the message about one that cannot be read."""
        if part.type != "image_url":
            return {"type": "text", "text": part.text}
        try:
            return {"type": "image", "image": self._rules.from_url(part.url)}
        except ApiError as error:
            raise error.at(place) from None


@contextmanager
def errors_about(field: str):
    """Names the field that was read when the engine refuses a prompt."""
    try:
        yield
    except UserError as error:
        raise as_api_error(error, field) from None


def is_empty_system(message: Message) -> bool:
    return message.role == "system" and message.says_nothing


def takes_system(family) -> bool:
    """Whether this family's prompts have a place for a system message."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]
    try:
        family.prompt(messages, family.languages[0])
    except ModelError:
        return False
    return True
