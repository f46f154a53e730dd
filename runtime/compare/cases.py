"""The questions of a comparison.

Takes the options and the model's family, returns the cases that both sides compute.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from models import family_of
from models.prompt.messages import content
from runtime.common.errors import ToolkitError
from runtime.common.sample_questions import QUESTIONS, Question

if TYPE_CHECKING:  # `--help` does without numpy
    from models.family import Family

    from .options import CompareOptions


@dataclass
class Case:
    """One question and its images (paths or PIL images); language None = the family's default
    wording."""

    question: str
    language: str | None
    images: list

    @property
    def messages(self) -> list[dict]:
        return [{"role": "user", "content": content(self.question, self.images)}]


def check_same_family(options: CompareOptions, family: Family):
    """Before anything is loaded: answers of another model would only look like a bad candidate."""
    other = family_of(options.reference)
    if other.name != family.name:
        raise ToolkitError(
            f"--reference {options.reference} is a {other.name} model, "
            f"--model a {family.name} model; give two checkpoints of one model"
        )


def choose_cases(options: CompareOptions, family: Family) -> list[Case]:
    """The user's questions and images; the built-in ones where there are none."""
    given = list(options.image)
    if options.prompt:
        return [Case(question, options.language, given) for question in options.prompt]
    cases = []
    for question in _built_in(bool(given), bool(family.vision)):
        language = options.language
        if language is None and question.language in family.languages:
            language = question.language
        images = given
        if question.scene and not given:
            images = [question.scene()]
        cases.append(Case(question.text, language, images))
    return cases


def _built_in(has_images: bool, has_vision: bool) -> list[Question]:
    """About images only, if the user gives some; without images, if the model cannot see."""
    if has_images:
        return [question for question in QUESTIONS if question.scene]
    if has_vision:
        return list(QUESTIONS)
    return [question for question in QUESTIONS if not question.scene]
