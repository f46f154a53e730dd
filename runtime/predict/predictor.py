"""Answers batches of questions.

Takes an engine and questions as `read_questions` gives them, returns the lines of the output file.
"""

import time
from pathlib import Path

from models.errors import UserError
from runtime.common.shared_flags import media_path
from runtime.engine.command import open_engine

from .questions import BadLine, chat_messages, optional

OUTCOME = ("answer", "finish_reason", "output_tokens", "seconds", "picture_process_time", "error")


def answer_batches(options, engine_options, sampling, batches: list[list]):
    """Yields the output lines of one batch after another, with an engine of this process."""
    engine = open_engine(options.model, engine_options)
    yield from map(predictor_of(options, engine, sampling).answer, batches)


def predictor_of(options, engine, sampling):
    """The Predictor of a command's options."""
    folder = Path(options.input).absolute().parent
    return Predictor(engine, sampling, options.language, folder, media_path(options))


class Predictor:
    """Answers questions together with one engine; a question that cannot be asked fails alone.

    language: of the questions that name none. folder: image files stand relative to it, and lie
    below it, or below `allowed`.
    """

    def __init__(
        self,
        engine,
        sampling,
        language: str | None,
        folder: Path,
        allowed: Path | None = None,
    ):
        self.engine = engine
        self.sampling = sampling
        self.language = language
        self.folder = folder
        self.allowed = allowed

    def answer(self, questions: list[dict | BadLine]) -> list[dict]:
        """The output lines, in order; "seconds" and "picture_process_time" (of the vision encoder;
        0 for pictures seen before) are those of the whole batch."""
        encoded = self.engine.vision_seconds
        prompts = [self.prompt_or_error(question) for question in questions]
        good = [prompt for prompt in prompts if not isinstance(prompt, Exception)]
        start = time.perf_counter()
        results = iter(self.engine.generate(good, self.sampling))
        seconds = time.perf_counter() - start
        times = {
            "seconds": round(seconds, 3),
            "picture_process_time": round(self.engine.vision_seconds - encoded, 3),
        }
        lines = []
        for question, prompt in zip(questions, prompts):
            if isinstance(prompt, Exception):
                lines.append(failed_line(question, prompt))
            else:
                lines.append(answered_line(question, next(results), times))
        return lines

    def prompt_or_error(self, question: dict | BadLine):
        """The Prompt of a question, its images encoded, or why it cannot be asked."""
        if isinstance(question, Exception):
            return question
        language = optional(question, "language", self.language)
        try:
            messages = chat_messages(question, self.folder, self.allowed)
            prompt = self.engine.prompt(messages, language=language)
            self.engine.settings(prompt, self.sampling)  # raises if it is too long
            self.engine.features(prompt)
        except (UserError, OSError) as error:
            return error
        return prompt


def answered_line(question: dict, result, times: dict) -> dict:
    return {
        **without_outcome(question),
        "answer": result.text,
        "finish_reason": result.finish_reason,
        "output_tokens": len(result.token_ids),
        **times,
    }


def failed_line(question: dict | BadLine, error: Exception) -> dict:
    """`error` in the line of `question`, with all that could be read of it."""
    fields = question.fields if isinstance(question, Exception) else question
    if isinstance(question, BadLine) and not fields:  # nothing else tells which line it was
        error = BadLine(f"line {question.line}: {error}")
    fields = without_outcome(fields)
    if isinstance(error, OSError) and error.strerror:
        return {**fields, "error": f"{error.strerror}: {error.filename}"}
    return {**fields, "error": str(error)}


def without_outcome(fields: dict) -> dict:
    """The fields of an input line, but for those of an earlier run whose output it was."""
    return {name: value for name, value in fields.items() if name not in OUTCOME}
