"""Benchmark workloads: prompts of an exact length, and the moments at which their tokens came.

Takes an engine and (batch size, input length, output length), returns one Timeline per request.
Nothing is printed or written here.
"""

import time
from dataclasses import dataclass, field

import numpy as np

from models.prompt.images import open_image
from models.prompt.messages import content
from runtime.common.errors import ToolkitError
from runtime.engine.options import SamplingParams

FILLER = (
    "The harbour was quiet in the morning; boats lay beside the pier and gulls waited for bread. "
    "清晨的港口很安静，渔船停在码头旁边，海鸥等着有人撒面包。"
)
QUESTION = "描述这张图片。"


@dataclass
class Timeline:
    """Seconds since the start of the case at which each output token was there; vision: seconds of
    the vision encoder."""

    input_tokens: int
    vision: float = 0.0
    tokens: list[float] = field(default_factory=list)


class PromptSource:
    """Prompts of random words of an exact length, or of a question about `images`, if there are
    any."""

    def __init__(self, engine, images, seed: int):
        self._engine = engine
        self._images = images
        self._rng = np.random.default_rng(seed)

    def prompts(self, count: int, length: int) -> list:
        if self._images:
            return image_prompts(self._engine, self._images, count, self._rng)
        return text_prompts(self._engine, count, length, self._rng)

    def shortest(self) -> int:
        """Tokens of the shortest prompt that there is: the frame and one word of a question."""
        if self._images:
            return 0
        head, tail = chat_frame(self._engine)
        return len(head) + len(tail) + 1

    def lengths(self, wanted: list[int]) -> list[int]:
        """Of the prompts: a question about an image has one, whatever is wanted."""
        if not self._images:
            return wanted
        [prompt] = self.prompts(1, 0)
        return [len(prompt.ids)]


def text_prompts(engine, count: int, length: int, rng: np.random.Generator) -> list:
    """`count` chat prompts of exactly `length` tokens: a short question, its words replaced by
    shuffled text, so that no prompt begins like another and nothing is found in the cache.

    ToolkitError if the chat's frame alone is longer.
    """
    head, tail = chat_frame(engine)
    frame = len(head) + len(tail)
    if length <= frame:
        raise ToolkitError(
            f"--input-len {length} is too short: the prompt's frame alone has {frame} tokens; give "
            f"{frame + 1} or more"
        )
    words = np.array(engine.family.tokenizer.encode(FILLER))
    prompts = []
    for _ in range(count):
        ids = np.concatenate((head, rng.choice(words, length - frame), tail))
        prompts.append(engine.prompt_from_ids(ids))
    return prompts


def chat_frame(engine) -> tuple[np.ndarray, np.ndarray]:
    """Token ids before and after a question: what the prompts of two questions have in common."""
    one = engine.prompt([{"role": "user", "content": "hi"}]).ids
    other = engine.prompt([{"role": "user", "content": "你好"}]).ids
    head = num_equal(one, other)
    tail = num_equal(one[::-1], other[::-1])
    return one[:head], one[len(one) - tail :]


def num_equal(one, other) -> int:
    """How many leading elements are the same."""
    return next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)


def image_prompts(engine, images, count: int, rng: np.random.Generator) -> list:
    """The same question about `count` images: the given ones in turn with one pixel changed, so
    that each is encoded."""
    opened = [open_image(image) for image in images]
    prompts = []
    for index in range(count):
        image = opened[index % len(opened)]
        image.putpixel((0, 0), tuple(int(value) for value in rng.integers(0, 256, 3)))
        message = {"role": "user", "content": content(QUESTION, [image.copy()])}
        prompts.append(engine.prompt([message]))
    return prompts


def run(engine, prompts: list, output_tokens: int, advance=lambda tokens: None) -> list[Timeline]:
    """Decode all prompts together, greedily, each to exactly `output_tokens`.

    advance(tokens of prompts and answers that have been computed since the last call).
    """
    params = SamplingParams(
        max_tokens=output_tokens, temperature=0, repetition_penalty=1.0, ignore_eos=True
    )
    start = time.perf_counter()
    timelines = {engine.add(prompt, params): Timeline(len(prompt.ids)) for prompt in prompts}
    try:
        record_tokens(engine, timelines, start, advance)
    finally:
        for request in timelines:
            engine.cancel(request)
    for request, timeline in timelines.items():
        timeline.vision = request.result.metrics["vision_seconds"]
    return list(timelines.values())


def record_tokens(engine, timelines: dict, start: float, advance):
    """Fill in when each token was there, until all requests have ended."""
    while engine.busy:
        for request, _ in engine.step():
            if request.error:
                raise request.error
            timeline = timelines[request]
            advance(1 if timeline.tokens else 1 + timeline.input_tokens)
            timeline.tokens.append(time.perf_counter() - start)
