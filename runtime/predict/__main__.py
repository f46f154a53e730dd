"""`python -m runtime.predict`: questions from a jsonl file in, answers in a jsonl file out, one line for each, in order.

An input line is {"prompt": text, "image": file or [files], "history": [[question, answer], ...], "language": "zh" | "en"};
all but the prompt may be left out, what else it holds is handed through. Pictures stand relative to the input file. An
output line is the input line and "answer", "finish_reason", "output_tokens" and "seconds", or "error".

While it runs, OUT.partial holds the job (first line) and the finished lines; OUT appears when all are there. A batch is
appended in one piece; after a kill the unfinished batch is asked again, so that the same questions are decoded together.
"""

import sys
from pathlib import Path

from runtime.common.errors import CHECK_FAILED, run_command
from runtime.common.flags import Parser
from runtime.engine.command import join_torchrun, open_engine
from runtime.engine.options import EngineOptions, SamplingParams

from .answer_file import Answers, job_of, opened
from .asker import Asker, tell
from .examples import show_examples
from .options import PredictOptions
from .questions import read_questions


def parser() -> Parser:
    return Parser(
        "python -m runtime.predict",
        "--model DIR (--input FILE --out FILE | --examples) [options]",
        "Answer every line of a jsonl file; a killed run continues where it was. Exit code 0: all lines were "
        "answered, 1: some failed (they say why).",
        {"input": PredictOptions, "engine": EngineOptions, "sampling": SamplingParams},
    )


def main(argv) -> int:
    options, engine_options, sampling = parser().parse(argv)
    join_torchrun(engine_options)
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


def predict(options, engine_options, sampling, questions, answers: Answers):
    """Ask what has no answer yet, batch by batch."""
    engine = open_engine(options.model, engine_options)
    asker = Asker(engine, sampling, options.language, Path(options.input).parent)
    for start in range(answers.count, len(questions), options.batch_size):
        batch = asker.ask(questions[start : start + options.batch_size])
        answers.append(batch)
        tell(batch, answers.count, len(questions))


def on_ray(*job):
    from .on_ray import predict

    predict(*job)


if __name__ == "__main__":
    sys.exit(run_command(main))
