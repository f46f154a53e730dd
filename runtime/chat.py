"""`python -m runtime.chat`: talk with a model, about an image or without one.

Takes a question (--prompt, or typed), streams the answer to stdout; all else goes to stderr, so
that the answer can be piped.
"""

import contextlib
import os
import re
import shlex
import sys
from dataclasses import dataclass, replace

from models import family_of
from models.errors import UserError
from models.prompt.messages import content
from models.prompt.picture_files import path_of
from models.terminal import for_stdout
from runtime.common.errors import INTERRUPTED, ToolkitError, run_command
from runtime.common.flags import Parser, flag
from runtime.common.progress import print_status
from runtime.engine.command import check_images, join_torchrun, open_engine
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

# without any of these, chat samples as the release does
SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "repetition_penalty")
SPEAKERS = {"user": "Q", "assistant": "A"}


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


def main(argv) -> int:
    options, engine_options, sampling = parser().parse(argv)
    join_torchrun(engine_options)
    question = one_question(options.prompt)
    check_images(family_of(options.model), options.image)
    engine = open_engine(options.model, one_at_a_time(engine_options))
    print_status("\n".join(engine.describe()))
    conversation = Conversation(engine, options, sampling)
    if question is None:
        return talk(conversation)
    print_answer(conversation, question)
    return 0


def parser() -> Parser:
    return Parser(
        "python -m runtime.chat",
        "--model DIR [--image FILE] [--prompt TEXT] [options]",
        "Chat with a model about a picture, or without one. With --prompt the answer goes to stdout "
        "and everything else to stderr; without it a conversation begins.",
        {"input": ChatOptions, "model": EngineOptions, "sampling": SamplingParams},
    )


def one_question(prompt: str | None) -> str | None:
    """The text of --prompt (from stdin for "-"), or None for an interactive conversation."""
    if prompt is None:
        return None
    if prompt == "-":
        text = sys.stdin.read()
    else:
        text = prompt.encode(errors="surrogateescape").decode(errors="replace")
    if not text.strip():
        raise ToolkitError(
            "the prompt is empty; give --prompt some text, or leave it out to talk interactively"
        )
    return text.strip()


class Conversation:
    """The turns so far and the images they are about."""

    def __init__(self, engine, options: ChatOptions, sampling: SamplingParams):
        self.engine = engine
        self.options = options
        self.sampling = sampling
        self.images = list(options.image)
        self.messages = []
        self._printed = None  # the sampling that was printed last

    def ask(self, question: str):
        """Yields the answer in pieces. The turn is remembered even if the caller stops early."""
        images = [] if self.messages else self.images
        messages = [*self.messages, {"role": "user", "content": content(question, images)}]
        prompt = self.engine.prompt(messages, language=self.options.language)
        if self.options.show_prompt:
            show_prompt(prompt)
        answer = ""
        try:
            for piece in self.engine.stream(prompt, self._sampling_of(prompt)):
                answer += piece
                yield piece
        finally:
            if answer:
                self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _sampling_of(self, prompt) -> SamplingParams:
        """What the flags say; without any, the sampling of the release's own chat, which is printed."""
        if any(getattr(self.sampling, name) is not None for name in SAMPLING_FLAGS):
            return self.sampling
        released = self.engine.family.chat_sampling(bool(prompt.pixels))
        chosen = {name: getattr(released, name) for name in SAMPLING_FLAGS}
        if chosen != self._printed:
            values = ", ".join(f"{name.replace('_', ' ')} {chosen[name]:g}" for name in chosen)
            print_status(f"sampling as in the release's chat: {values}")
            self._printed = chosen
        return replace(self.sampling, **chosen)

    def change_image(self, file: str):
        """Begin a new conversation about the image in this file, or about none."""
        images = []
        if file:
            images.append(os.path.expanduser(file))
        check_images(self.engine.family, images)
        self.images = images
        self.clear()

    def clear(self):
        self.messages = []

    def history(self) -> str:
        lines = [f"[{image}]" for image in self.images]
        for message in self.messages:
            lines.append(f"{SPEAKERS[message['role']]}: {text_of(message['content'])}")
        return "\n".join(lines) or "nothing yet / 还没有对话"


def text_of(content: str | list[dict]) -> str:
    return content if isinstance(content, str) else content[-1]["text"]


def show_prompt(prompt):
    ids = " ".join(map(str, prompt.ids.tolist()))
    print_status(f"prompt text: {prompt.text!r}\nprompt ids ({len(prompt.ids)}): {ids}")


def talk(conversation: Conversation) -> int:
    """Read questions and commands. Returns the exit code: 0 at the end of input and for /stop, 130
    for Ctrl-C at the prompt."""
    enable_line_editing()
    print_status(WELCOME)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print_status("\nbye / 再见")
            return INTERRUPTED
        if line in ("/stop", "/exit", "stop"):
            return 0
        if line:
            respond(conversation, line)


def enable_line_editing():
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (arrow keys and history for input())


def respond(conversation: Conversation, line: str):
    """Run a command or answer a question. Mistakes are printed, and the conversation goes on."""
    try:
        if not run_chat_command(conversation, line):
            print_answer(conversation, line)
    except KeyboardInterrupt:
        print_status("\n(stopped / 已中止)")
    except (UserError, OSError) as error:
        print_status(f"error: {error}")


def run_chat_command(conversation: Conversation, line: str) -> bool:
    """Run `line` if it is a command; False if it is a question."""
    word, *rest = line.split(maxsplit=1)
    rest = "".join(rest)
    if word == "/image":
        conversation.change_image(typed_path(rest))
        names = ", ".join(conversation.images) or "none"
        print_status(f"picture: {names}; a new conversation begins / 新对话")
    elif line in ("/clear", "clear"):
        conversation.clear()
        print_status("conversation cleared / 对话已清空")
    elif line == "/history":
        print_status(conversation.history())
    elif line == "/help":
        print_status(HELP)
    elif re.fullmatch("/[a-z]+", word):
        print_status(f"{word} is no command; /help lists them / 没有这个命令，输入 /help 查看")
    else:
        return False
    return True


def typed_path(text: str) -> str:
    """The file that a user typed, or dropped into the terminal, which then writes it as a shell
    takes it (my\\ photo.jpg, 'my photo.jpg') or as a file: URL."""
    text = text.strip()
    if not text or os.path.exists(os.path.expanduser(text)):
        return text
    if text.startswith("file:"):
        return path_of(text)
    try:
        words = shlex.split(text)
    except ValueError:  # a quotation mark of the name itself
        return text
    return typed_path(words[0]) if len(words) == 1 and words[0] != text else text


def print_answer(conversation: Conversation, question: str):
    """Stream the answer to stdout; then print its cost, and why it ended early, to stderr."""
    for piece in conversation.ask(question):
        print(for_stdout(piece), end="", flush=True)
    print(flush=True)
    engine = conversation.engine
    result = engine.last_result
    vision_seconds = result.metrics["vision_seconds"]
    if vision_seconds > 0.0005:  # not when the features were remembered
        print_status(f"picture process time: {vision_seconds:.3f} s ({engine.describe()[-1]})")
    print_status(cost_line(result.metrics))
    if result.finish_reason == "length":
        print_status(length_note(result.metrics, conversation.sampling.max_tokens))


def cost_line(metrics: dict) -> str:
    tokens = metrics["output_tokens"]
    seconds = metrics["decode_seconds"]
    speed = f" at {(tokens - 1) / seconds:.1f} tokens/s" if tokens > 1 and seconds else ""
    return (
        f"(prompt {metrics['prompt_tokens']} tokens in {metrics['prefill_seconds']:.2f} s, "
        f"answer {tokens} tokens{speed})"
    )


def length_note(metrics: dict, max_tokens: int | None) -> str:
    if max_tokens is not None:
        return f"note: the answer was cut at --max-tokens {max_tokens}; give a larger one for more"
    total = metrics["prompt_tokens"] + metrics["output_tokens"]
    return (
        f"note: the answer was cut because prompt and answer reached {total} tokens, the length "
        "limit; --max-tokens sets another one"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
