"""`python -m runtime.chat`: talk with a model, about a picture or without one.

A question flows in (--prompt, or typed), the answer streams out on stdout; all else goes to stderr, so that it pipes.
"""

import contextlib
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from models.errors import UserError
from models.prompt.messages import content
from runtime.common.errors import INTERRUPTED, ToolkitError, run_command
from runtime.common.flags import Parser, flag
from runtime.engine.command import check_pictures, join_torchrun, open_engine
from runtime.engine.options import EngineOptions, InputOptions, SamplingParams, one_at_a_time

WELCOME = """\
Type a question; /help lists the commands, Ctrl-C stops an answer.
输入问题开始对话；/help 查看命令，Ctrl-C 中止回答。"""
HELP = """\
/image FILE   talk about another picture; without FILE about none     换一张图片；不带文件名则不用图片
/clear        forget the conversation, keep the picture (or: clear)   清空对话，保留图片
/history      show the conversation                                   查看对话历史
/help         show this                                               查看命令
/stop, /exit  end (or: stop, Ctrl-D)                                  退出"""


@dataclass(kw_only=True)
class ChatOptions(InputOptions):
    prompt: str | None = flag(
        "one question, answered on stdout; - reads it from stdin (default: talk interactively)",
        default=None,
        metavar="TEXT",
    )
    show_prompt: bool = flag(
        "print the exact text and token ids given to the model", default=False, kind=bool
    )


class Conversation:
    """The turns so far and the pictures they are about."""

    def __init__(self, engine, options: ChatOptions, sampling: SamplingParams):
        self.engine = engine
        self.options = options
        self.sampling = sampling
        self.pictures = list(options.image)
        self.messages = []

    def ask(self, question: str):
        """Yields the answer in pieces. The turn is remembered, also when the caller stops half-way."""
        messages = [*self.messages, {"role": "user", "content": self._content(question)}]
        prompt = self.engine.prompt(messages, language=self.options.language)
        if self.options.show_prompt:
            show_prompt(prompt)
        answer = ""
        try:
            for piece in self.engine.stream(prompt, self.sampling):
                answer += piece
                yield piece
        finally:
            if answer:
                self.messages = [*messages, {"role": "assistant", "content": answer}]

    def look_at(self, picture: str):
        """Begin a new conversation about the picture in this file, or about none."""
        pictures = [str(Path(picture).expanduser())] if picture else []
        check_pictures(self.engine.family, pictures)
        self.pictures = pictures
        self.clear()

    def clear(self):
        self.messages = []

    def history(self) -> str:
        turns = [
            f"{'Q' if m['role'] == 'user' else 'A'}: {text_of(m['content'])}" for m in self.messages
        ]
        return "\n".join([*(f"[{p}]" for p in self.pictures), *turns]) or "nothing yet / 还没有对话"

    def _content(self, question):
        pictures = [] if self.messages else self.pictures
        return content(question, pictures)


def text_of(content) -> str:
    return content if isinstance(content, str) else content[-1]["text"]


def parser() -> Parser:
    return Parser(
        "python -m runtime.chat",
        "--model DIR [--image FILE] [--prompt TEXT] [options]",
        "Chat with a model about a picture, or without one. With --prompt the answer goes to stdout and "
        "everything else to stderr; without it a conversation begins.",
        {"input": ChatOptions, "model": EngineOptions, "sampling": SamplingParams},
    )


def main(argv) -> int:
    options, engine_options, sampling = parser().parse(argv)
    join_torchrun(engine_options)
    for stream in filter(None, (sys.stdin, sys.stdout)):
        stream.reconfigure(
            errors="replace"
        )  # a terminal of another encoding must not end in a traceback
    question = one_question(options.prompt)
    from models import family_of

    check_pictures(family_of(options.model), options.image)
    engine = open_engine(options.model, one_at_a_time(engine_options))
    tell("\n".join(engine.describe()))
    conversation = Conversation(engine, options, sampling)
    if question is None:
        return talk(conversation)
    answer(conversation, question)
    return 0


def one_question(prompt: str | None) -> str | None:
    """The text of --prompt (from stdin for "-"), or None for an interactive conversation."""
    if prompt is None:
        return None
    text = (
        sys.stdin.read()
        if prompt == "-"
        else prompt.encode(errors="surrogateescape").decode(errors="replace")
    )
    if not text.strip():
        raise ToolkitError(
            "the prompt is empty; give --prompt some text, or leave it out to talk interactively"
        )
    return text.strip()


def talk(conversation: Conversation) -> int:
    """Read questions and commands until the end of input (0), /stop (0) or Ctrl-C at the prompt (130)."""
    enable_line_editing()
    tell(WELCOME)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            tell("\nbye / 再见")
            return INTERRUPTED
        if line in ("/stop", "/exit", "stop"):
            return 0
        if line:
            respond(conversation, line)


def respond(conversation: Conversation, line: str):
    """One line of the user: a command or a question. Mistakes are told, and the conversation goes on."""
    try:
        if not run_command_line(conversation, line):
            answer(conversation, line)
    except KeyboardInterrupt:
        tell("\n(stopped / 已中止)")
    except (UserError, OSError) as error:
        tell(f"error: {error}")


def run_command_line(conversation: Conversation, line: str) -> bool:
    """Run `line` if it is a command; False if it is a question."""
    word, _, rest = line.partition(" ")
    if word == "/image":
        conversation.look_at(rest.strip().strip("'\""))
        tell(
            f"picture: {', '.join(conversation.pictures) or 'none'}; a new conversation begins / 新对话"
        )
    elif line in ("/clear", "clear"):
        conversation.clear()
        tell("conversation cleared / 对话已清空")
    elif line == "/history":
        tell(conversation.history())
    elif line == "/help":
        tell(HELP)
    elif re.fullmatch("/[a-z]+", word):
        tell(f"{word} is no command; /help lists them / 没有这个命令，输入 /help 查看")
    else:
        return False
    return True


def answer(conversation: Conversation, question: str):
    """Stream the answer to stdout, then tell what it cost and why it ended."""
    for piece in conversation.ask(question):
        print(piece, end="", flush=True)
    print(flush=True)
    result = conversation.engine.last_result
    if result.metrics["vision_seconds"] > 0.0005:  # not when the features were remembered
        tell(
            f"picture process time: {result.metrics['vision_seconds']:.3f} s ({conversation.engine.describe()[-1]})"
        )
    tell(cost(result.metrics))
    if result.finish_reason == "length":
        tell(why_it_ended(result.metrics, conversation.sampling.max_tokens))


def cost(metrics: dict) -> str:
    tokens = metrics["output_tokens"]
    seconds = metrics["decode_seconds"]
    speed = f" at {(tokens - 1) / seconds:.1f} tokens/s" if tokens > 1 and seconds else ""
    return (
        f"(prompt {metrics['prompt_tokens']} tokens in {metrics['prefill_seconds']:.2f} s, "
        f"answer {tokens} tokens{speed})"
    )


def why_it_ended(metrics: dict, max_tokens: int | None) -> str:
    if max_tokens is not None:
        return f"note: the answer was cut at --max-tokens {max_tokens}; give a larger one for more"
    total = metrics["prompt_tokens"] + metrics["output_tokens"]
    return (
        f"note: the answer was cut because prompt and answer reached {total} tokens, the length limit; "
        "--max-tokens sets another one"
    )


def show_prompt(prompt):
    tell(
        f"prompt text: {prompt.text!r}\nprompt ids ({len(prompt.ids)}): {' '.join(map(str, prompt.ids.tolist()))}"
    )


def enable_line_editing():
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history for input())


def tell(text: str):
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
