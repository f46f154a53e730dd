"""`runtime.compare --dataset FILE.jsonl`: both sides answer questions whose answers are known.

A line is one of `runtime.predict` with "answer", and "choices" where it is one of several: the choice of the largest
probability counts. Without choices the greedy text counts, exactly, but for blanks around it.
"""

from pathlib import Path

from runtime.common.errors import ToolkitError
from runtime.engine.options import SamplingParams
from runtime.predict.questions import chat_messages, read_questions


def read(path: str) -> list[dict]:
    """ToolkitError for a file, or a line, that is no question with an answer."""
    if not Path(path).is_file():
        raise ToolkitError(
            f"--dataset {path} does not exist; give a jsonl file with prompt, answer and perhaps image and "
            "choices"
        )
    questions = read_questions(path)
    for number, question in enumerate(questions, 1):
        if isinstance(question, Exception):
            raise ToolkitError(f"--dataset {path}, question {number}: {question}")
        known = question.get("answer")
        if not isinstance(known, str) or known not in question.get("choices", [known]):
            raise ToolkitError(
                f'--dataset {path}, question {number}: no "answer" text, or it is none of the choices'
            )
    return questions


def answers(
    engine, questions: list[dict], path: str, language: str | None, max_tokens: int
) -> list[str]:
    from runtime.common.progress import track

    folder = Path(path).parent
    greedy = SamplingParams(temperature=0, repetition_penalty=1, max_tokens=max_tokens)
    return [
        answer(engine, question, chat_messages(question, folder), language, greedy)
        for question in track(f"{engine.family.name}: questions", questions)
    ]


def answer(engine, question: dict, messages: list[dict], language: str | None, greedy) -> str:
    wording = question.get("language") or question.get("lang") or language
    prompt = engine.prompt(
        messages, language=wording if wording in engine.family.languages else None
    )
    if "choices" in question:
        return max(question["choices"], key=lambda choice: log_probability(engine, prompt, choice))
    return engine.generate([prompt], greedy)[0].text.strip()


def log_probability(engine, prompt, text: str) -> float:
    """Of the whole text as the beginning of the answer, in nats."""
    import numpy as np

    from runtime.common.metrics import log_softmax

    ids = list(engine.family.tokenizer.encode(text))
    rows = log_softmax(engine.score(prompt, ids).astype(np.float64))
    return float(rows[np.arange(len(ids)), ids].sum())


def summary(path: str, questions: list[dict], reference: list[str], candidate: list[str]) -> dict:
    """Shares of right answers, of equal ones, and the questions that the sides answer differently."""
    right = [
        sum(a == q["answer"].strip() for a, q in zip(side, questions)) / len(questions)
        for side in (reference, candidate)
    ]
    other = [
        {
            "question": number,
            "prompt": q["prompt"],
            "answer": q["answer"],
            "reference": a,
            "candidate": b,
        }
        for number, (q, a, b) in enumerate(zip(questions, reference, candidate), 1)
        if a != b
    ]
    return {
        "file": path,
        "questions": len(questions),
        "reference": right[0],
        "candidate": right[1],
        "same": 1 - len(other) / len(questions),
        "differences": other,
    }
