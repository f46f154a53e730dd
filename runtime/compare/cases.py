"""The questions of a comparison."""

from __future__ import annotations

from dataclasses import dataclass

from models.prompt.messages import content
from runtime.common.errors import ToolkitError
from runtime.common.sample_questions import QUESTIONS

from .options import CompareOptions


@dataclass
class Case:
    """One question and its pictures (path or PIL image); language None = the family's default wording."""

    question: str
    language: str | None
    pictures: list

    @property
    def messages(self):
        return [{"role": "user", "content": content(self.question, self.pictures)}]


def check_same_family(options: CompareOptions, family):
    """Before anything is loaded: answers of another model would only look like a bad candidate."""
    from models import family_of

    other = family_of(options.reference)
    if other.name != family.name:
        raise ToolkitError(
            f"--reference {options.reference} is a {other.name} model, --model a {family.name} model; "
            "give two checkpoints of one model"
        )


def choose_cases(options: CompareOptions, family) -> list[Case]:
    """The user's questions and pictures; the built-in ones where there are none."""
    given = list(options.image)
    if options.prompt:
        return [Case(question, options.language, given) for question in options.prompt]
    chosen = [q for q in QUESTIONS if (q.scene if given else family.vision or not q.scene)]
    return [
        Case(
            q.text,
            options.language or (q.language if q.language in family.languages else None),
            given or ([q.scene()] if q.scene else []),
        )
        for q in chosen
    ]
