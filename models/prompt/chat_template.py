"""Chat templates: prompt text exactly as transformers renders a model directory's own template.

Takes messages, returns the prompt's text. No code of the checkpoint runs: a template is Jinja,
rendered in jinja2's immutable sandbox, in a process whose time and memory are limited.
"""

from pathlib import Path

from models.errors import ModelError
from models.side_files import is_there, read_optional_json, read_text

from .special_tokens import special_names
from .templates.client import PROCESS_OF_TEMPLATES


class ChatTemplate:
    """A template that can be compiled.

    tokens: the special tokens that it may name (bos_token, ...). origin: what messages call it.
    takes_parts: whether content is OpenAI's list of parts for it, else a string.
    """

    def __init__(
        self,
        source: str,
        tokens: dict[str, str] | None = None,
        origin: str = "the default chat template",
    ):
        self.source = source
        self.origin = origin
        self._tokens = tokens or {}
        self.takes_parts = PROCESS_OF_TEMPLATES.ask(source, None, origin) == "parts"

    def render(self, messages: list[dict], tools: list[dict] | None = None, **variables) -> str:
        """Prompt text up to where the answer begins.

        ModelError if the template refuses the messages or has no place for tools.
        """
        if tools and "tools" not in self.source:
            raise ModelError(f"{self.origin} has no place for tools; leave the tools out")
        variables |= self._tokens
        variables |= {"messages": messages, "tools": tools, "documents": None}
        variables["add_generation_prompt"] = True
        return PROCESS_OF_TEMPLATES.ask(self.source, variables, self.origin)


def directory_template(directory: Path, tools: bool = False) -> ChatTemplate | None:
    """The template of a model directory; None if it has none.

    Of several named ones "default", or "tool_use" with `tools`.
    """
    found = find_template(directory, tools)
    if found is None:
        return None
    source, origin = found
    return ChatTemplate(source, special_names(directory), origin)


def find_template(directory: Path, tools: bool = False) -> tuple[str, str] | None:
    """(source, what messages call it) of the template that `directory_template` compiles: of
    chat_template.jinja, chat_template.json and tokenizer_config.json the first that has one."""
    file = directory / "chat_template.jinja"
    if is_there(file):
        return read_text(file), str(file)
    for name in ("chat_template.json", "tokenizer_config.json"):
        content = read_optional_json(directory / name)
        source = _select(content.get("chat_template"), tools)
        if source is not None:
            return source, f"the chat template in {directory / name}"
    return None


def _select(template: str | dict | list | None, tools: bool) -> str | None:
    """The source of a chat_template field, which may be one or several named templates."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if not isinstance(template, dict):
        return template
    if tools and "tool_use" in template:
        return template["tool_use"]
    return template.get("default")
