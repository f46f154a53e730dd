"""Three built-in questions about three images."""

import sys
import time
from pathlib import Path

from runtime.engine.command import open_engine


def show_examples(options, engine_options, sampling) -> int:
    """The predict mode of the VisualGLM guide: three answers, the time of the first and of the others."""
    from models import family_of
    from models.prompt.messages import content
    from runtime.common.sample_questions import EXAMPLES
    from runtime.engine.command import check_pictures

    folder = Path(options.model) / "examples"
    files = [folder / f"{number}.jpeg" for number in (1, 2, 3)]
    own = all(file.is_file() for file in files)
    check_pictures(family_of(options.model), [EXAMPLES[0].scene()])
    if not own:
        print(
            f"note: {folder} has no 1.jpeg, 2.jpeg and 3.jpeg; drawn pictures are used instead",
            file=sys.stderr,
        )
    engine = open_engine(options.model, engine_options)
    for index, (question, file) in enumerate(zip(EXAMPLES, files)):
        start = time.perf_counter()
        asked = content(question.text, [file if own else question.scene()])
        prompt = engine.prompt([{"role": "user", "content": asked}], language=options.language)
        text = engine.generate([prompt], sampling)[0].text
        name = (
            "首次执行时间 / first execution" if index == 0 else "非首次执行时间 / later execution"
        )
        print(
            f"{file.name if own else question.scene.__name__}: {question.text}\n{name}: "
            f"{time.perf_counter() - start:.3f} s\n{text}\n",
            flush=True,
        )
    return 0
