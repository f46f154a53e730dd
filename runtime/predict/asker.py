"""Asks one question and prints its answer."""

import sys
import time
from pathlib import Path

from models.errors import UserError
from runtime.common.errors import ToolkitError


def tell(batch: list[dict], done: int, total: int):
    """A line on stderr for each answer of the batch that was the last of `done` lines."""
    for number, answer in enumerate(batch, done - len(batch) + 1):
        told = (
            f"failed: {answer['error']}"
            if "error" in answer
            else f"{answer['output_tokens']} tokens, {answer['seconds']:.2f} s"
        )
        print(f"[{number}/{total}] {told}", file=sys.stderr, flush=True)


class Asker:
    """Questions as dicts in, answers as dicts out; a question that cannot be asked fails alone."""

    def __init__(self, engine, sampling, language: str | None, folder: Path):
        self.engine = engine
        self.sampling = sampling
        self.language = language
        self.folder = folder

    def ask(self, questions: list[dict | ToolkitError]) -> list[dict]:
        prompts = [self._prompt(question) for question in questions]
        good = [p for p in prompts if not isinstance(p, Exception)]
        start = time.perf_counter()
        results = iter(self.engine.generate(good, self.sampling))
        seconds = time.perf_counter() - start
        return [
            self.failed(question, prompt)
            if isinstance(prompt, Exception)
            else self._answered(question, next(results), seconds)
            for question, prompt in zip(questions, prompts)
        ]

    def _prompt(self, question):
        if isinstance(question, Exception):
            return question
        try:
            prompt = self.engine.prompt(
                self.messages(question), language=question.get("language") or self.language
            )
            self.engine.settings(prompt, self.sampling)  # too long?
            self.engine.features(prompt)
            return prompt
        except (UserError, OSError) as error:
            return error

    def messages(self, question: dict) -> list[dict]:
        """Pictures belong to the first question of a conversation."""
        from models.prompt.messages import content

        images = question.get("image") or []
        pictures = [
            str(self.folder / image) for image in ([images] if isinstance(images, str) else images)
        ]
        turns = [text for turn in question.get("history") or [] for text in turn] + [
            question["prompt"]
        ]
        messages = [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)
        ]
        messages[0]["content"] = content(turns[0], pictures)
        return messages

    @staticmethod
    def _answered(question, result, seconds):
        return {
            **question,
            "answer": result.text,
            "finish_reason": result.finish_reason,
            "output_tokens": len(result.token_ids),
            "seconds": round(seconds, 3),
        }

    @staticmethod
    def failed(question, error):
        known = {} if isinstance(question, Exception) else question
        return {
            **known,
            "error": f"{error.strerror}: {error.filename}"
            if getattr(error, "strerror", None)
            else str(error),
        }
