"""`python -m runtime.predict`: questions from a jsonl file in, answers in a jsonl file out, one line for each, in order.

An input line is {"prompt": text, "image": file or [files], "history": [[question, answer], ...], "language": "zh" | "en"};
all but the prompt may be left out, what else it holds is handed through. Pictures stand relative to the input file. An
output line is the input line and "answer", "finish_reason", "output_tokens" and "seconds", or "error".

While it runs, OUT.partial holds the job (first line) and the finished lines; OUT appears when all are there. A batch is
appended in one piece; after a kill the unfinished batch is asked again, so that the same questions are decoded together.
"""
import fcntl
import hashlib
import json
import os
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.common.errors import CHECK_FAILED, ToolkitError, run_command
from runtime.common.flags import EngineOptions, Parser, SamplingParams, check_choices, check_folder, flag, require


@dataclass(kw_only=True)
class PredictOptions:
    model: str = flag("folder of a downloaded checkpoint", "-m", "--model-path", metavar="DIR")
    input: str | None = flag("questions: a jsonl file with prompt, image, history, language per line", default=None,
                             metavar="FILE")
    out: str | None = flag("answers: the jsonl file to be written; run again to continue after a kill", default=None,
                           metavar="FILE")
    examples: bool = flag("instead of --input: the three pictures in the checkpoint's examples/ (or three drawn ones), with "
                          "a question and its time each", default=False, kind=bool)
    batch_size: int = flag("questions decoded together", default=1, kind=int, metavar="N")
    engine: str = flag("what computes the batches: local one after another, ray over the devices of a cluster, or of this "
                       "machine", default="local", choices=("local", "ray"))
    actors: int | None = flag("ray: how many engines (default: one per NPU; on the CPU one per machine)", default=None,
                              kind=int, metavar="N")
    language: str | None = flag("wording of the prompt around the question (default: as released)", default=None,
                                choices=("zh", "en"))

    def __post_init__(self):
        check_choices(self)
        check_folder("model", self.model)
        require(self, "batch_size", self.batch_size >= 1, "1 or more is needed, e.g. 8")
        require(self, "actors", self.actors is None or (self.actors >= 1 and self.engine == "ray"),
                "1 or more is needed, and --engine ray")
        if self.examples == bool(self.input):
            raise ToolkitError("give either --input FILE --out FILE, or --examples")
        if self.input:
            require(self, "out", bool(self.out), "the answers need a file, e.g. --out answers.jsonl")
            require(self, "input", Path(self.input).is_file(), "there is no such file")
            require(self, "out", Path(self.out).parent.is_dir(), "its folder does not exist; make it first")


def parser() -> Parser:
    return Parser("python -m runtime.predict", "--model DIR (--input FILE --out FILE | --examples) [options]",
                  "Answer every line of a jsonl file; a killed run continues where it was. Exit code 0: all lines were "
                  "answered, 1: some failed (they say why).",
                  {"input": PredictOptions, "engine": EngineOptions, "sampling": SamplingParams})


def main(argv) -> int:
    options, engine_options, sampling = parser().parse(argv)
    if options.examples:
        return show_examples(options, engine_options, sampling)
    questions = read_questions(options.input)
    with opened(Path(options.out), job_of(options, engine_options, sampling)) as answers:
        answers.keep_whole_batches(options.batch_size, len(questions))
        if answers.count:
            print(f"continuing after line {answers.count}", file=sys.stderr)
        if answers.count < len(questions):
            run = on_ray if options.engine == "ray" else predict
            run(options, engine_options, sampling, questions, answers)
        failed = answers.publish()
    print(f"{options.out}: {len(questions)} lines, {failed} failed")
    return CHECK_FAILED if failed else 0


def read_questions(path: str) -> list[dict | ToolkitError]:
    """One entry per line that is not blank; an error for a line that is no question, which then fails alone."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ToolkitError(f"--input {path} is not UTF-8 text; save it as UTF-8 jsonl") from None
    found = [read_question(line) for line in lines if line.strip()]
    if not found:
        raise ToolkitError(f"--input {path} holds no questions; write one JSON object per line, e.g. "
                           '{"prompt": "Describe the picture.", "image": "a.png"}')
    return found


def read_question(line: str) -> dict | ToolkitError:
    try:
        question = json.loads(line)
    except ValueError as error:
        return ToolkitError(f"no JSON ({error})")
    if not isinstance(question, dict) or not isinstance(question.get("prompt"), str) or not question["prompt"].strip():
        return ToolkitError('no "prompt" text')
    history = question.get("history") or []
    if not all(isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn) for turn in history):
        return ToolkitError('"history" is not a list of [question, answer]')
    images = question.get("image") or []
    if not isinstance(images, str) and not all(isinstance(image, str) for image in images):
        return ToolkitError('"image" is neither a file name nor a list of them')
    return question


def job_of(options, engine_options, sampling) -> dict:
    """What must be the same when a run is continued, or its answers would not belong together."""
    digest = hashlib.sha256(Path(options.input).read_bytes()).hexdigest()
    return json.loads(json.dumps({"input": digest, "model": str(Path(options.model).resolve()), "language": options.language,
                                  "batch_size": options.batch_size, "engine": asdict(engine_options),
                                  "sampling": asdict(sampling)}))


class Answers:
    """The partial file: the job, then finished lines. Opened by `opened`, which holds its lock."""

    def __init__(self, out: Path, stream, job: dict):
        self.out, self.partial, self.stream = out, Path(stream.name), stream
        head = (json.dumps(job) + "\n").encode()
        lines = stream.read().splitlines(keepends=True)
        if not lines or not lines[0].endswith(b"\n"):       # new, or killed within the first line
            self._cut([])
            stream.write(head)
        elif lines[0] != head:
            raise ToolkitError(f"{self.partial} was begun with another model, input or other options; remove it, or give "
                               "another --out")
        self.head, self.lines = head, [line for line in lines[1:] if line.endswith(b"\n")]

    @property
    def count(self) -> int:
        return len(self.lines)

    def keep_whole_batches(self, batch_size: int, total: int):
        """Forget the lines of a batch that was not appended to its end."""
        whole = self.count if self.count == total else self.count // batch_size * batch_size
        self.lines = self.lines[:whole]
        self._cut([self.head, *self.lines])

    def append(self, answers: list[dict]):
        lines = [(json.dumps(answer, ensure_ascii=False) + "\n").encode() for answer in answers]
        self.stream.write(b"".join(lines))
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.lines += lines

    def publish(self) -> int:
        """The finished file under its name; returns how many lines failed."""
        from runtime.vision.artifact import write_atomically
        write_atomically(self.out, b"".join(self.lines).decode())
        self.partial.unlink()
        return sum("error" in json.loads(line) for line in self.lines)

    def _cut(self, lines):
        self.stream.seek(0)
        self.stream.truncate(sum(map(len, lines)))
        self.stream.seek(0, os.SEEK_END)


@contextmanager
def opened(out: Path, job: dict):
    """Answers of a new or a continued run. ToolkitError if another process writes them, or a finished file is there."""
    if out.exists():
        raise ToolkitError(f"--out {out} exists already; remove it, or give another name")
    with open(out.with_name(out.name + ".partial"), "a+b") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ToolkitError(f"another process is writing {stream.name}; wait for it, or give another --out") from None
        stream.seek(0)
        yield Answers(out, stream, job)


def predict(options, engine_options, sampling, questions, answers: Answers):
    """Ask what has no answer yet, batch by batch."""
    from runtime import Engine
    engine = Engine(options.model, **vars(engine_options))
    asker = Asker(engine, sampling, options.language, Path(options.input).parent)
    for start in range(answers.count, len(questions), options.batch_size):
        batch = asker.ask(questions[start:start + options.batch_size])
        answers.append(batch)
        tell(batch, answers.count, len(questions))


def on_ray(*job):
    from .on_ray import predict
    predict(*job)


def tell(batch: list[dict], done: int, total: int):
    """A line on stderr for each answer of the batch that was the last of `done` lines."""
    for number, answer in enumerate(batch, done - len(batch) + 1):
        told = f"failed: {answer['error']}" if "error" in answer else \
            f"{answer['output_tokens']} tokens, {answer['seconds']:.2f} s"
        print(f"[{number}/{total}] {told}", file=sys.stderr, flush=True)


def show_examples(options, engine_options, sampling) -> int:
    """The predict mode of the VisualGLM guide: three answers, the time of the first and of the others."""
    from models import family_of
    from runtime import Engine
    from runtime.common.flags import check_pictures
    from runtime.common.sample_questions import EXAMPLES, content
    folder = Path(options.model) / "examples"
    files = [folder / f"{number}.jpeg" for number in (1, 2, 3)]
    own = all(file.is_file() for file in files)
    check_pictures(family_of(options.model), [EXAMPLES[0].scene()])
    if not own:
        print(f"note: {folder} has no 1.jpeg, 2.jpeg and 3.jpeg; drawn pictures are used instead", file=sys.stderr)
    engine = Engine(options.model, **vars(engine_options))
    for index, (question, file) in enumerate(zip(EXAMPLES, files)):
        start = time.perf_counter()
        asked = content(question.text, [file if own else question.scene()])
        prompt = engine.prompt([{"role": "user", "content": asked}], language=options.language)
        text = engine.generate([prompt], sampling)[0].text
        name = "首次执行时间 / first execution" if index == 0 else "非首次执行时间 / later execution"
        print(f"{file.name if own else question.scene.__name__}: {question.text}\n{name}: "
              f"{time.perf_counter() - start:.3f} s\n{text}\n", flush=True)
    return 0


class Asker:
    """Questions as dicts in, answers as dicts out; a question that cannot be asked fails alone."""

    def __init__(self, engine, sampling, language: str | None, folder: Path):
        self.engine, self.sampling, self.language, self.folder = engine, sampling, language, folder

    def ask(self, questions: list[dict | ToolkitError]) -> list[dict]:
        prompts = [self._prompt(question) for question in questions]
        good = [p for p in prompts if not isinstance(p, Exception)]
        start = time.perf_counter()
        results = iter(self.engine.generate(good, self.sampling))
        seconds = time.perf_counter() - start
        return [self.failed(question, prompt) if isinstance(prompt, Exception)
                else self._answered(question, next(results), seconds) for question, prompt in zip(questions, prompts)]

    def _prompt(self, question):
        from models.family import ModelError
        if isinstance(question, Exception):
            return question
        try:
            prompt = self.engine.prompt(self.messages(question), language=question.get("language") or self.language)
            self.engine.settings(prompt, self.sampling)     # too long?
            self.engine.features(prompt)
            return prompt
        except (ToolkitError, ModelError, OSError) as error:
            return error

    def messages(self, question: dict) -> list[dict]:
        """Pictures belong to the first question of a conversation."""
        from runtime.common.sample_questions import content
        images = question.get("image") or []
        pictures = [str(self.folder / image) for image in ([images] if isinstance(images, str) else images)]
        turns = [text for turn in question.get("history") or [] for text in turn] + [question["prompt"]]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        messages[0]["content"] = content(turns[0], pictures)
        return messages

    @staticmethod
    def _answered(question, result, seconds):
        return {**question, "answer": result.text, "finish_reason": result.finish_reason,
                "output_tokens": len(result.token_ids), "seconds": round(seconds, 3)}

    @staticmethod
    def failed(question, error):
        known = {} if isinstance(question, Exception) else question
        return {**known, "error": f"{error.strerror}: {error.filename}" if getattr(error, "strerror", None) else str(error)}


if __name__ == "__main__":
    sys.exit(run_command(main))
