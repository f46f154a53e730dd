"""Answers batches of questions.

Takes an engine and questions as `read_questions` gives them, returns the lines of the output file.
"""

import time
from pathlib import Path

from models.errors import UserError
from runtime.common.errors import ToolkitError
from runtime.engine.command import open_engine

from .questions import chat_messages


def answer_batches(options, engine_options, sampling, batches: list[list]):
    """Yields the output lines of one batch after another, with an engine of this process."""
    engine = open_engine(options.model, engine_options)
    predictor = Predictor(engine, sampling, options.language, Path(options.input).parent)
    yield from map(predictor.answer, batches)


class Predictor:
    """Answers questions together with one engine; a question that cannot be asked fails alone.

    language: of the questions that name none. folder: image files stand relative to it.
    """

    def __init__(self, engine, sampling, language: str | None, folder: Path):
        self.engine = engine
        self.sampling = sampling
        self.language = language
        self.folder = folder

    def answer(self, questions: list[dict | ToolkitError]) -> list[dict]:
        """The output lines, in order; "seconds" and "picture_process_time" (of the vision encoder;
        0 for pictures seen before) are those of the whole batch."""
        encoded = self.engine.vision_seconds
        prompts = [self._prompt_or_error(question) for question in questions]
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

    def _prompt_or_error(self, question: dict | ToolkitError):
        if isinstance(question, Exception):
            return question
        language = question.get("language") or self.language
        try:
            prompt = self.engine.prompt(chat_messages(question, self.folder), language=language)
            self.engine.settings(prompt, self.sampling)  # raises if it is too long
            self.engine.features(prompt)
        except (UserError, OSError) as error:
            return error
        return prompt


def answered_line(question: dict, result, times: dict) -> dict:
    return {
        **question,
        "answer": result.text,
        "finish_reason": result.finish_reason,
        "output_tokens": len(result.token_ids),
        **times,
    }


def failed_line(question: dict | ToolkitError, error: Exception) -> dict:
    """`error` in the line of `question`; alone, where the input line was no question."""
    fields = {} if isinstance(question, Exception) else question
    if isinstance(error, OSError) and error.strerror:
        return {**fields, "error": f"{error.strerror}: {error.filename}"}
    return {**fields, "error": str(error)}
