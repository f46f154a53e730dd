"""Load for a benchmark: prompts of an exact length, and the moments at which their tokens came.

In flows an engine and (batch, input length, output length), out flow one Timeline per request and the figures of the
case. Nothing is printed or written here.
"""

import time
from dataclasses import dataclass, field

import numpy as np

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
    """Seconds since the start of the case at which each output token was there."""

    input_tokens: int
    vision: float = 0.0
    tokens: list[float] = field(default_factory=list)


def text_prompts(engine, count: int, length: int, rng: np.random.Generator) -> list:
    """`count` chat prompts of exactly `length` tokens: a short question, its words replaced by shuffled text, so that no
    prompt begins like another and nothing is found in the cache."""
    frame = [engine.prompt([{"role": "user", "content": text}]).ids for text in ("hi", "你好")]
    same = next(i for i, (a, b) in enumerate(zip(*frame)) if a != b)
    tail = next(i for i, (a, b) in enumerate(zip(frame[0][::-1], frame[1][::-1])) if a != b)
    head = frame[0][:same]
    tail = frame[0][len(frame[0]) - tail :]
    room = length - len(head) - len(tail)
    if room < 1:
        raise ToolkitError(
            f"--input-len {length} is too short: the prompt's frame alone has {len(head) + len(tail)} "
            f"tokens; give {len(head) + len(tail) + 1} or more"
        )
    words = np.array(engine.family.tokenizer.encode(FILLER))
    return [
        engine.prompt_from_ids(np.concatenate((head, rng.choice(words, room), tail)))
        for _ in range(count)
    ]


def picture_prompts(engine, pictures, count: int, rng: np.random.Generator) -> list:
    """The same question about `count` pictures, the given ones in turn with one pixel changed, so that each is encoded."""
    from models.prompt.images import open_image

    images = [open_image(picture) for picture in pictures]
    prompts = []
    for i in range(count):
        image = images[i % len(images)]
        image.putpixel((0, 0), tuple(int(v) for v in rng.integers(0, 256, 3)))
        prompts.append(
            engine.prompt([{"role": "user", "content": content(QUESTION, [image.copy()])}])
        )
    return prompts


def run(engine, prompts: list, output_tokens: int, progress=lambda tokens: None) -> list[Timeline]:
    """Decode all prompts together, greedily, each to exactly `output_tokens`; progress(tokens of prompts and answers that
    have been computed since the last call)."""
    params = SamplingParams(
        max_tokens=output_tokens, temperature=0, repetition_penalty=1.0, ignore_eos=True
    )
    start = time.perf_counter()
    requests = [engine.add(prompt, params) for prompt in prompts]
    lines = {id(r): Timeline(len(p.ids)) for r, p in zip(requests, prompts)}
    try:
        while engine.busy:
            for request, _ in engine.step():
                if request.error:
                    raise request.error
                line = lines[id(request)]
                progress(1 if line.tokens else 1 + line.input_tokens)
                line.tokens.append(time.perf_counter() - start)
    finally:
        for request in requests:
            engine.cancel(request)
    for request in requests:
        lines[id(request)].vision = request.result.metrics["vision_seconds"]
    return list(lines.values())
