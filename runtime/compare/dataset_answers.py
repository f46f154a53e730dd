"""What an engine answers to the questions of a data set.

Takes an engine and questions (dataset.py), returns one text per question.
"""

from pathlib import Path

import numpy as np

from models.errors import UserError
from runtime.common.errors import ToolkitError
from runtime.common.metrics import log_softmax
from runtime.common.progress import track
from runtime.engine.options import SamplingParams
from runtime.predict.questions import chat_messages, optional


def answers(
    engine,
    questions: list[dict],
    path: str,
    language: str | None,
    max_tokens: int,
    allowed: Path | None = None,
) -> list[str]:
    """Greedy answers; images are looked up beside the file at `path`, or in `allowed`. ToolkitError
    with the question's number for one that the model cannot be asked."""
    folder = Path(path).parent
    greedy = SamplingParams(temperature=0, repetition_penalty=1, max_tokens=max_tokens)
    found = []
    for number, question in enumerate(track(f"{engine.family.name}: questions", questions), 1):
        try:
            messages = chat_messages(question, folder, allowed)
            found.append(_answer(engine, question, messages, language, greedy))
        except UserError as error:
            sentence = f"--dataset {path}, question {number}: {error}"
            raise ToolkitError(sentence, error.exit_code) from None
    return found


def _answer(
    engine, question: dict, messages: list[dict], language: str | None, greedy: SamplingParams
) -> str:
    wording = question.get("language") or question.get("lang") or language
    if wording not in engine.family.languages:
        wording = None
    prompt = engine.prompt(messages, language=wording)
    choices = optional(question, "choices", None)
    if choices:
        return max(choices, key=lambda choice: _log_probability(engine, prompt, choice))
    return engine.generate([prompt], greedy)[0].text.strip()


def _log_probability(engine, prompt, text: str) -> float:
    """Of the whole text as the beginning of the answer, in nats."""
    ids = list(engine.family.tokenizer.encode(text))
    rows = log_softmax(engine.score(prompt, ids).astype(np.float64))
    return float(rows[np.arange(len(ids)), ids].sum())
