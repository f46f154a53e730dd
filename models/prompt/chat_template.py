"""Chat templates: prompt text exactly as transformers renders a model directory's own template.

Takes messages, returns the prompt's text. No code of the checkpoint runs: a template is Jinja,
rendered in jinja2's immutable sandbox.
"""

import json
from datetime import datetime
from pathlib import Path

from models.errors import ModelError
from models.side_files import read_optional_json

SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class ChatTemplate:
    """A compiled template.

    tokens: the special tokens that it may name (bos_token, ...). origin: what messages call it.
    """

    def __init__(
        self,
        source: str,
        tokens: dict[str, str] | None = None,
        origin: str = "the default chat template",
    ):
        import jinja2

        self.source = source
        self.origin = origin
        self._tokens = tokens or {}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(
                f"{origin} is not valid Jinja (line {error.lineno}: {error.message}); "
                "download it again"
            ) from None

    def render(self, messages: list[dict], tools: list[dict] | None = None, **variables) -> str:
        """Prompt text up to where the answer begins.

        ModelError if the template refuses the messages or has no place for tools.
        """
        if tools and "tools" not in self.source:
            raise ModelError(f"{self.origin} has no place for tools; leave the tools out")
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=True,
                **self._tokens,
                **variables,
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise ModelError(f"{self.origin} cannot render these messages ({error})") from None


def directory_template(directory: Path, tools: bool = False) -> ChatTemplate | None:
    """The template of a model directory; None if it has none.

    Of chat_template.jinja, chat_template.json and tokenizer_config.json the first that has one. Of
    several named ones "default", or "tool_use" with `tools`.
    """
    settings = read_optional_json(directory / "tokenizer_config.json")
    named_tokens = read_optional_json(directory / "special_tokens_map.json")
    tokens = special_tokens(named_tokens | settings)
    file = directory / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), tokens, str(file))
    contents = {
        "chat_template.json": read_optional_json(directory / "chat_template.json"),
        "tokenizer_config.json": settings,
    }
    for name, content in contents.items():
        source = _select(content.get("chat_template"), tools)
        if source is not None:
            return ChatTemplate(source, tokens, f"the chat template in {directory / name}")
    return None


def special_tokens(settings: dict) -> dict[str, str]:
    """Special tokens of a tokenizer_config.json: plain strings, or dicts with a "content"."""
    tokens = {}
    for name in SPECIAL:
        token = settings.get(name)
        if token:
            tokens[name] = token["content"] if isinstance(token, dict) else token
    return tokens


def _select(template: str | dict | list | None, tools: bool) -> str | None:
    """The source of a chat_template field, which may be one or several named templates."""
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if not isinstance(template, dict):
        return template
    if tools and "tool_use" in template:
        return template["tool_use"]
    return template.get("default")


def _environment():
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks an assistant's text for training; rendering ignores it."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(
                parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
            )

    def raise_exception(message):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        """Plain JSON; jinja2's own filter would escape <, > and & for HTML."""
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return environment
