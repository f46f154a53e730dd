"""Chat templates: messages in, prompt text out, exactly as transformers renders the model directory's own template.

No code of the checkpoint runs: a template is Jinja, rendered in jinja2's immutable sandbox.
"""

import json
from datetime import datetime
from pathlib import Path

from models.config import read_json
from models.errors import ModelError

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
    """A compiled template. `tokens` are the special tokens it may name (bos_token, ...), `origin` is for errors."""

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
        """Prompt text up to where the answer begins. ModelError if the template refuses messages or tools."""
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
    """The template of a model directory, from the first that has one: chat_template.jinja, chat_template.json,
    tokenizer_config.json. Of several named ones "default", or "tool_use" with `tools`. None if there is none."""
    settings = _json(directory / "tokenizer_config.json")
    tokens = special_tokens(_json(directory / "special_tokens_map.json") | settings)
    file = directory / "chat_template.jinja"
    if file.is_file():
        return ChatTemplate(file.read_text(encoding="utf-8"), tokens, str(file))
    for name, content in (
        ("chat_template.json", _json(directory / "chat_template.json")),
        ("tokenizer_config.json", settings),
    ):
        source = _named(content.get("chat_template"), tools)
        if source is not None:
            return ChatTemplate(source, tokens, f"the chat template in {directory / name}")
    return None


def special_tokens(settings: dict) -> dict[str, str]:
    """Special tokens of a tokenizer_config.json: plain strings, or dicts with a "content"."""
    given = {name: settings[name] for name in SPECIAL if settings.get(name)}
    return {
        name: token["content"] if isinstance(token, dict) else token
        for name, token in given.items()
    }


def _named(template, tools: bool) -> str | None:
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    if isinstance(template, dict):
        return template.get("tool_use" if tools and "tool_use" in template else "default")
    return template


def _json(path: Path) -> dict:
    return read_json(path) if path.is_file() else {}


def _environment():
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks what an assistant said, for training; for rendering it is transparent."""

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
