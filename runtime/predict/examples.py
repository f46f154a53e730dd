"""`python -m runtime.predict --examples`, the predict mode of the VisualGLM guide.

Takes a model, prints its answers to three built-in questions about three images, and their times.
"""

import time
from pathlib import Path

from models import family_of
from models.prompt.messages import content
from models.terminal import for_stdout
from runtime.common.progress import print_status
from runtime.common.sample_questions import EXAMPLES
from runtime.engine.command import check_images, open_engine

FIRST = "首次执行时间 / first execution"
LATER = "非首次执行时间 / later execution"


def show_examples(options, engine_options, sampling):
    """Print three answers; the first one's time is marked, because it includes warming up."""
    check_images(family_of(options.model), [EXAMPLES[0].scene()])
    images = example_images(Path(options.model) / "examples")
    engine = open_engine(options.model, engine_options)
    for index, (question, (name, image)) in enumerate(zip(EXAMPLES, images)):
        message = {"role": "user", "content": content(question.text, [image])}
        start = time.perf_counter()
        prompt = engine.prompt([message], language=options.language)
        [result] = engine.generate([prompt], sampling)
        seconds = time.perf_counter() - start
        title = FIRST if index == 0 else LATER
        encoding = f"picture process time: {result.metrics['vision_seconds']:.3f} s"
        print(f"{name}: {question.text}\n{title}: {seconds:.3f} s ({encoding})")
        print(for_stdout(f"{result.text}\n"), flush=True)


def example_images(folder: Path) -> list[tuple]:
    """(name, file) of the checkpoint's own three images, or else (name, drawn PIL image)."""
    files = [folder / f"{number}.jpeg" for number in (1, 2, 3)]
    if all(file.is_file() for file in files):
        return [(file.name, file) for file in files]
    print_status(
        f"note: {folder} has no 1.jpeg, 2.jpeg and 3.jpeg; drawn pictures are used instead"
    )
    return [(question.scene.__name__, question.scene()) for question in EXAMPLES]
