"""`runtime.compare --dataset FILE.jsonl`: questions whose answers are known.

Takes the file, returns its questions; takes both sides' answers, returns how many are right. A line
is one of `runtime.predict` with "answer", and "choices" where it is one of several: the choice of
the largest probability counts. Without choices the greedy text counts, exactly, but for blanks
around it.
"""

from pathlib import Path

from runtime.common.errors import ToolkitError
from runtime.predict.questions import read_questions


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


def summary(path: str, questions: list[dict], reference: list[str], candidate: list[str]) -> dict:
    """Shares of right answers, of equal ones, and the questions with different answers."""
    differences = []
    for number, question in enumerate(questions, 1):
        answers = {"reference": reference[number - 1], "candidate": candidate[number - 1]}
        if answers["reference"] != answers["candidate"]:
            known = {"prompt": question["prompt"], "answer": question["answer"]}
            differences.append({"question": number, **known, **answers})
    return {
        "file": path,
        "questions": len(questions),
        "reference": _share_right(questions, reference),
        "candidate": _share_right(questions, candidate),
        "same": 1 - len(differences) / len(questions),
        "differences": differences,
    }


def _share_right(questions: list[dict], answers: list[str]) -> float:
    right = 0
    for question, answer in zip(questions, answers):
        right += answer == question["answer"].strip()
    return right / len(questions)
