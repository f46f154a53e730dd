"""`python -m runtime.predict --against`: the same questions on a second device, or answered before.

Takes the questions, answers them greedily on --device and on the other side, and writes both answers
side by side into an html report, with the first token at which they part and the gap there.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from jinja2 import Environment

from models import family_of
from models.prompt.messages import content
from models.terminal import for_stdout
from runtime.common.errors import ToolkitError
from runtime.common.files import prepare, write_atomically
from runtime.common.notes import note
from runtime.common.progress import print_status
from runtime.common.sample_questions import EXAMPLES
from runtime.engine.command import check_images, open_engine
from runtime.engine.options import SamplingParams

from .examples import example_images
from .parting import Parting, find_parting
from .predictor import predictor_of
from .questions import read_questions

PAGE = Path(__file__).with_name("against.html")
LIKELIEST = 20  # of each step, whose logits are known on both sides


@dataclass
class Answer:
    """One side's answer. logprobs: per token, {token id: log probability} of the likeliest; no
    tokens where only a text is known."""

    text: str = ""
    token_ids: list[int] | None = None
    logprobs: list[dict[int, float]] = field(default_factory=list)
    error: str | None = None


class ExampleQuestions:
    """The built-in questions of --examples."""

    def __init__(self, options):
        check_images(family_of(options.model), [EXAMPLES[0].scene()])
        self.texts = [question.text for question in EXAMPLES]
        self._images = [image for _, image in example_images(Path(options.model) / "examples")]
        self._language = options.language

    def prompts(self, engine) -> list:
        found = []
        for text, image in zip(self.texts, self._images):
            message = {"role": "user", "content": content(text, [image])}
            found.append(engine.prompt([message], language=self._language))
        return found


class FileQuestions:
    """The lines of --input; a line that cannot be asked is an error in place of a Prompt."""

    def __init__(self, options):
        self._asked = read_questions(options.input)
        self._options = options
        self.texts = []
        for each in self._asked:
            self.texts.append("" if isinstance(each, Exception) else each["prompt"])

    def prompts(self, engine) -> list:
        predictor = predictor_of(self._options, engine, SamplingParams())
        return [predictor.prompt_or_error(each) for each in self._asked]


def compare_answers(options, engine_options, sampling):
    """Writes the report, and a line for each question to stdout."""
    report = Path(options.report)
    prepare(str(report.parent))
    questions = ExampleQuestions(options) if options.examples else FileQuestions(options)
    greedy = replace(
        sampling,
        temperature=0.0,
        repetition_penalty=sampling.repetition_penalty or 1.0,
        logprobs=LIKELIEST,
    )
    note("--against compares greedy answers, and writes --report in place of --out")
    theirs = None
    if options.against_file:
        theirs = texts_of(options.against_file, len(questions.texts))
    ours = answers_on(options.model, engine_options, greedy, questions)
    if theirs is None:
        other = other_options(engine_options, options.against)
        theirs = answers_on(options.model, other, greedy, questions)
    rows = compare_sides(family_of(options.model), questions.texts, ours, theirs)
    sides = [engine_options.device, f"{options.against} (--against)"]
    write_report(report, options.model, sides, rows)


def answers_on(model: str, engine_options, sampling, questions) -> list[Answer]:
    """Loads the model, answers, and gives the memory back."""
    print_status(f"answering on {engine_options.device}")
    engine = open_engine(model, engine_options)
    print_status("\n".join(engine.describe()))
    try:
        return [answer_of(engine, prompt, sampling) for prompt in questions.prompts(engine)]
    finally:
        engine.close()


def answer_of(engine, prompt, sampling) -> Answer:
    if isinstance(prompt, Exception):
        return Answer(error=str(prompt))
    [result] = engine.generate([prompt], sampling)
    token_ids = list(result.token_ids)
    if result.finish_reason == "stop":
        token_ids += engine.family.stop_ids[:1]
    return Answer(result.text, token_ids, list(result.logprobs))


def other_options(engine_options, device: str):
    """The same model on the other side's device, without what only the first side's can do."""
    options = replace(engine_options, device=device, tensor_parallel_size=1)
    if options.vision == "om":
        options = replace(options, vision="torch")
    return options


def texts_of(path: Path, count: int) -> list[Answer]:
    """Answers of a jsonl file that runtime.predict wrote; ToolkitError unless there is one for each
    question."""
    lines = read_questions(str(path), "--against")
    answers = []
    for number, line in enumerate(lines, 1):
        text = None if isinstance(line, Exception) else line.get("answer")
        if not isinstance(text, str):
            raise ToolkitError(
                f'--against {path}: line {number} has no "answer" text; give a file that '
                "`python -m runtime.predict --out` wrote"
            )
        answers.append(Answer(text))
    if len(answers) != count:
        raise ToolkitError(
            f"--against {path} has {len(answers)} answers, --input has {count} questions; give the "
            "answers to the same questions"
        )
    return answers


def compare_sides(family, questions: list[str], ours: list[Answer], theirs: list[Answer]):
    """{"question", "answers", "parting", "error"} of every question."""
    rows = []
    for title, one, other in zip(questions, ours, theirs):
        error = one.error or other.error
        parting = None if error else find_parting(family, one, other)
        answers = [one.text, other.text]
        rows.append({"question": title, "answers": answers, "parting": parting, "error": error})
    return rows


def write_report(report: Path, model: str, sides: list[str], rows: list[dict]):
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(PAGE.read_text(encoding="utf-8"))
    write_atomically(report, template.render(model=model, sides=sides, rows=rows))
    same = 0
    for number, row in enumerate(rows, 1):
        parting: Parting | None = row["parting"]
        outcome = row["error"] or (parting.describe(sides) if parting else "the same answer")
        same += not row["error"] and parting is None
        print(for_stdout(f"[{number}/{len(rows)}] {outcome}"))
    print(f"{same} of {len(rows)} answers are the same; report: {report}")
