"""Builds the prompts of requests.

Takes messages, text or token ids, returns what `Engine.add` takes; ApiError for more than the model
or the operator allows. Runs in the few threads that read prompts and images.
"""

import json

from models.errors import ModelError

from .engine_thread import EngineThread
from .errors import ApiError
from .images import ImageRules
from .messages import Message
from .schema import LegacyRequest

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
    ):
        """tools: descriptions of functions. forced: the one that the answer has to call."""
        tools = tools or []
        self._check_tools(messages, tools)
        self._check_image_count(messages)
        text_characters = sum(len(text) for message in messages for text in message.texts)
        tool_characters = len(json.dumps(tools, ensure_ascii=False))
        self._check_characters(text_characters + tool_characters)
        turns = [self._as_chat_message(message) for message in self._that_say_something(messages)]
        if forced:
            turns.append({"role": "assistant", "metadata": forced, "content": ""})
        return self._engine.prompt(turns, language or self._language, tools or None)

    def legacy(self, request: LegacyRequest):
        """Worded in the language of the question, where the family has that wording."""
        languages = self._engine.family.languages
        language = request.language if request.language in languages else None
        return self.chat(request.messages(), language)

    def completion(self, prompt: str | list[int]):
        """A prompt without a chat's frame."""
        ids = self.token_ids(prompt) if isinstance(prompt, str) else prompt
        if not ids:
            raise ApiError("the prompt is empty", param="prompt")
        self.check_length(len(ids), None)
        return self._engine.prompt_from_ids(ids)

    def token_ids(self, text: str) -> list[int]:
        self._check_characters(len(text))
        return self._engine.family.tokenizer.encode(text)

    def check_length(self, prompt_tokens: int, max_new_tokens: int | None):
        longest = self._engine.max_model_len
        new = max_new_tokens or 1
        if prompt_tokens + new > longest:
            raise ApiError(
                f"the model's maximum context length is {longest} tokens; the prompt has "
                f"{prompt_tokens} and {new} more were asked for",
                code="context_length_exceeded",
                param="messages",
            )

    def _check_characters(self, characters: int):
        """No token is longer than 128 characters, so text above this cannot fit; refuse before
        tokenising."""
        longest = self._engine.max_model_len
        if characters > MAX_TOKEN_CHARACTERS * longest:
            raise ApiError(
                f"{characters:,} characters exceed the model's maximum context length of "
                f"{longest} tokens",
                code="context_length_exceeded",
                param="messages",
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

    def _that_say_something(self, messages: list[Message]) -> list[Message]:
        """Without empty system messages where the model knows no system message."""
        empty = [each for each in messages if each.role == "system" and each.says_nothing]
        if not empty or takes_system(self._engine.family):
            return messages
        return [each for each in messages if each not in empty]

    def _as_chat_message(self, message: Message) -> dict:
        chat_message = {"role": message.role, "content": self._content(message.content)}
        if message.tool_calls:
            chat_message["tool_calls"] = [call.model_dump() for call in message.tool_calls]
        return chat_message

    def _content(self, content):
        if not isinstance(content, list):
            return content or ""
        parts = []
        for part in content:
            if part.type == "text":
                parts.append({"type": "text", "text": part.text})
            else:
                parts.append({"type": "image", "image": self._rules.from_url(part.url)})
        return parts


def takes_system(family) -> bool:
    """Whether this family's prompts have a place for a system message."""
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "?"}]
    try:
        family.prompt(messages, family.languages[0])
    except ModelError:
        return False
    return True
