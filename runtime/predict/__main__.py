"""`python -m runtime.predict`: answers every line of a jsonl file with questions.

Takes --input, a jsonl file of {"prompt": text, "image": file or [files], "history": [[question,
answer], ...], "language": "zh" | "en"}, where all but the prompt may be left out; image files stand
relative to it. Writes --out, one line for each input line, in order: the input line, with all else
that it holds, and "answer", "finish_reason", "output_tokens", "seconds" and "picture_process_time",
or "error".

While it runs, OUT.partial holds the job (first line) and the finished lines; OUT appears when all
are there. A batch is appended in one write; after a kill the unfinished batch is asked again, so
that the same questions are decoded together.
"""

import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from runtime.common.errors import CHECK_FAILED, run_command
from runtime.common.flags import Parser
from runtime.common.progress import print_status
from runtime.engine.command import join_torchrun
from runtime.engine.options import EngineOptions, SamplingParams

from . import predictor
from .answer_file import AnswerFile, job_description, open_answer_file
from .examples import show_examples
from .options import PredictOptions
from .questions import read_questions


def main(argv) -> int:
    options, given, sampling = parser().parse(argv)
    engine_options = replace(given, max_num_seqs=given.max_num_seqs or options.batch_size)
    join_torchrun(engine_options)
    if options.against:
        from .against import compare_answers

        compare_answers(options, engine_options, sampling)
        return 0
    if options.examples:
        show_examples(options, engine_options, sampling)
        return 0
    questions = read_questions(options.input)
    job = job_description(options, given, sampling)
    with open_answer_file(Path(options.out), job) as answer_file:
        answer_file.keep_whole_batches(options.batch_size, len(questions))
        if answer_file.count:
            print_status(f"continuing after line {answer_file.count}")
        if answer_file.count < len(questions):
            predict(options, engine_options, sampling, questions, answer_file)
        failed = answer_file.publish()
    print(f"{options.out}: {len(questions)} lines, {failed} failed")
    return CHECK_FAILED if failed else 0


def parser() -> Parser:
    return Parser(
        "python -m runtime.predict",
        "--model DIR (--input FILE --out FILE | --examples) [--against DEVICE|FILE] [options]",
        "Answer every line of a jsonl file; a killed run continues where it was. Exit code 0: all "
        "lines were answered, 1: some failed (they say why).",
        {"input": PredictOptions, "engine": EngineOptions, "sampling": SamplingParams},
    )


def predict(options, engine_options, sampling, questions: list, answer_file: AnswerFile):
    """Answer the questions that have no line yet, batch by batch."""
    batches = [
        questions[start : start + options.batch_size]
        for start in range(answer_file.count, len(questions), options.batch_size)
    ]
    answer_batches = choose_engine(options.engine)
    with closing(answer_batches(options, engine_options, sampling, batches)) as answered:
        for lines in answered:
            answer_file.append(lines)
            print_results(lines, answer_file.count, len(questions))


def choose_engine(name: str):
    """`answer_batches` of --engine NAME."""
    if name == "local":
        return predictor.answer_batches
    from . import on_ray

    return on_ray.answer_batches


def print_results(lines: list[dict], count: int, total: int):
    """A status line for each output line of a batch that was the last of `count` lines."""
    for number, line in enumerate(lines, count - len(lines) + 1):
        if "error" in line:
            outcome = f"failed: {line['error']}"
        else:
            outcome = f"{line['output_tokens']} tokens, {line['seconds']:.2f} s"
        print_status(f"[{number}/{total}] {outcome}")


if __name__ == "__main__":
    sys.exit(run_command(main))
