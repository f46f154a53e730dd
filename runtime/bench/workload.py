"""Load for a benchmark: prompts of an exact length, and the moments at which their tokens came.

In flows an engine and (batch, input length, output length), out flow one Timeline per request and the figures of the
case. Nothing is printed or written here.
"""
import time
from dataclasses import dataclass, field

import numpy as np

from runtime.common.errors import ToolkitError
from runtime.common.flags import SamplingParams
from runtime.common.sample_questions import content

FILLER = ("The harbour was quiet in the morning; boats lay beside the pier and gulls waited for bread. "
          "清晨的港口很安静，渔船停在码头旁边，海鸥等着有人撒面包。")
QUESTION = "描述这张图片。"
PERCENTILES = (50, 90, 95, 99)
SPREAD = {"mean": np.mean, "median": np.median, "std": np.std}


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
    head, tail = frame[0][:same], frame[0][len(frame[0]) - tail:]
    room = length - len(head) - len(tail)
    if room < 1:
        raise ToolkitError(f"--input-len {length} is too short: the prompt's frame alone has {len(head) + len(tail)} "
                           f"tokens; give {len(head) + len(tail) + 1} or more")
    words = np.array(engine.family.tokenizer.encode(FILLER))
    return [engine.prompt_from_ids(np.concatenate((head, rng.choice(words, room), tail))) for _ in range(count)]


def picture_prompts(engine, pictures, count: int, rng: np.random.Generator) -> list:
    """The same question about `count` pictures, the given ones in turn with one pixel changed, so that each is encoded."""
    from models.prompt.images import open_image
    images, prompts = [open_image(picture) for picture in pictures], []
    for i in range(count):
        image = images[i % len(images)]
        image.putpixel((0, 0), tuple(int(v) for v in rng.integers(0, 256, 3)))
        prompts.append(engine.prompt([{"role": "user", "content": content(QUESTION, [image.copy()])}]))
    return prompts


def run(engine, prompts: list, output_tokens: int, progress=lambda tokens: None) -> list[Timeline]:
    """Decode all prompts together, greedily, each to exactly `output_tokens`; progress(tokens of prompts and answers that
    have been computed since the last call)."""
    params = SamplingParams(max_tokens=output_tokens, temperature=0, repetition_penalty=1.0, ignore_eos=True)
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


def case_figures(lines: list[Timeline]) -> dict:
    """The VisualGLM guide's columns, in ms. The first token counts when every sequence of the batch has one; a token's
    time is the mean of the steps after that, in which all decode together (None for answers of one token)."""
    last = max(lines, key=lambda line: line.tokens[0])
    first, steps = last.tokens[0], len(last.tokens) - 1
    each = (last.tokens[-1] - first) / steps if steps else None
    return {"ResponseTime(ms)": 1000 * max(line.tokens[-1] for line in lines), "FirstTokenTime(ms)": 1000 * first,
            "TimePerTokens(ms)": each and 1000 * each, "TokensPerSecond(ms)": each and 1 / each}


def serving_figures(lines: list[Timeline]) -> dict:
    """vLLM's names: seconds of the whole case, throughputs per second, latencies of the requests in ms."""
    seconds = max(line.tokens[-1] for line in lines)
    produced, read = sum(len(line.tokens) for line in lines), sum(line.input_tokens for line in lines)
    between = [gap for line in lines for gap in np.diff(line.tokens)]
    spread = {"ttft": [line.tokens[0] for line in lines], "itl": between, "e2el": [line.tokens[-1] for line in lines],
              "tpot": [(x.tokens[-1] - x.tokens[0]) / (len(x.tokens) - 1) for x in lines if len(x.tokens) > 1]}
    found = {"completed": len(lines), "duration": seconds, "total_input_tokens": read, "total_output_tokens": produced,
             "request_throughput": len(lines) / seconds, "output_throughput": produced / seconds,
             "total_token_throughput": (read + produced) / seconds,
             "vision_encode_ms": 1000 * float(np.mean([line.vision for line in lines]))}
    for name, values in spread.items():
        if values:
            found |= {f"{kind}_{name}_ms": 1000 * float(measure(values)) for kind, measure in SPREAD.items()}
            found |= {f"p{p}_{name}_ms": 1000 * float(np.percentile(values, p)) for p in PERCENTILES}
    return found


def perf_info(lines: list[Timeline]) -> dict:
    """`***Perf Info***` of the vllm_utils guides: strings with units. latency_per_token = latency / output length;
    prefill_latency_per_token is the mean time to the first token (the guides' name, not divided by anything)."""
    seconds, length = max(line.tokens[-1] for line in lines), len(lines[0].tokens)
    found = {"latency_num_prompts": f"{1000 * seconds:.2f} ms", "latency_per_token": f"{1000 * seconds / length:.2f} ms",
             "request_per_second": f"{len(lines) / seconds:.3f} requests/s",
             "token_per_second": f"{len(lines) * length / seconds:.2f} tokens/s",
             "prefill_latency_per_token": f"{1000 * np.mean([line.tokens[0] for line in lines]):.2f} ms",
             "decode_latency_per_token": None, "decode_throughput": None}
    if length > 1:
        fastest = min((line.tokens[-1] - line.tokens[0]) / (length - 1) for line in lines)
        found |= {"decode_latency_per_token": f"{1000 * fastest:.2f} ms", "decode_throughput": f"{1 / fastest:.2f} tokens/s"}
    return found
