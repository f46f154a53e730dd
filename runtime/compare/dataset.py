"""`runtime.compare --dataset FILE.jsonl`: questions whose answers are known.

Takes the file, returns its questions; takes both sides' answers, returns how many are right. A line
is one of `runtime.predict` with "answer", and "choices" where it is one of several: the choice of
the largest probability counts. Without choices the greedy text counts, exactly, but for blanks
around it.
"""

from dataclasses import replace
from pathlib import Path

from models.errors import ModelError
from models.prompt.messages import plain_text
from runtime.common.errors import ToolkitError
from runtime.common.jsonl import read_lines
from runtime.predict.questions import are_texts, chat_messages, optional, read_question

LETTERS = "ABCD"


def read(path: str, allowed: Path | None = None) -> list[dict]:
    """ToolkitError, with the number of the line, unless all are questions with an answer.
    allowed: folder in which pictures may lie, beside the file's own."""
    if not Path(path).is_file():
        raise ToolkitError(
            f"--dataset {path} does not exist; give a jsonl file with prompt, answer and perhaps image and "
            "choices"
        )
    folder = Path(path).parent
    questions = []
    for line in read_lines(path, "--dataset"):
        question = read_question(replace(line, value=as_question(line.value)))
        problem = question
        if not isinstance(question, Exception):
            problem = problem_of(question) or picture_problem(question, folder, allowed)
        if problem:
            place = f"line {line.number}, question {len(questions) + 1}"
            raise ToolkitError(f"--dataset {path}, {place}: {problem}")
        questions.append(with_plain_texts(question))
    if not questions:
        raise ToolkitError(f"--dataset {path} is empty; give one question with an answer per line")
    return questions


def as_question(value):
    """A line of CEval (inputs_pretokenized, choices_pretokenized, label or targets_pretokenized), as
    `python -m quant --calib` takes it, with the fields of a question; any other unchanged."""
    if not isinstance(value, dict) or "prompt" in value or "inputs_pretokenized" not in value:
        return value
    question = {**value, "prompt": value["inputs_pretokenized"]}
    choices = value.get("choices_pretokenized", value.get("choices"))
    label = value.get("label")
    targets = value.get("targets_pretokenized")
    if label is not None and choices is None:
        choices = list(LETTERS)
    if choices:
        question["choices"] = choices
    if isinstance(targets, list) and targets:
        question.setdefault("answer", targets[0])
    elif is_place(label, choices):
        question.setdefault("answer", choices[label])
    return question


def is_place(label, choices) -> bool:
    """Whether the label is the number of a choice, from 0; True is none."""
    return type(label) is int and isinstance(choices, list) and 0 <= label < len(choices)


def with_plain_texts(question: dict) -> dict:
    """The question with texts that a report can show."""
    plain = {name: plain_text(question[name]) for name in ("prompt", "answer")}
    choices = optional(question, "choices", None)
    if choices:
        plain["choices"] = [plain_text(choice) for choice in choices]
    return {**question, **plain}


def picture_problem(question: dict, folder: Path, allowed: Path | None) -> ModelError | None:
    try:
        chat_messages(question, folder, allowed)
    except ModelError as error:
        return error
    return None


def problem_of(question: dict) -> str | None:
    """What keeps a question from having a known answer."""
    known = question.get("answer")
    choices = optional(question, "choices", [known])
    if known is None and question.get("label") is not None and are_texts(choices):
        return f'"label" is not the number of a choice, from 0 to {len(choices) - 1}'
    if choices != [known] and not are_texts_to_choose(choices):
        return '"choices" is not a list of texts such as ["red", "blue"]'
    if not isinstance(known, str) or not known.strip():
        return 'no "answer" text'
    if known not in choices:
        return '"answer" is none of the choices'
    return None


def are_texts_to_choose(choices) -> bool:
    return are_texts(choices) and all(choice.strip() for choice in choices)


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
        right += answer.strip() == question["answer"].strip()
    return right / len(questions)
