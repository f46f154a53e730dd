"""Figures of a benchmark: averages, percentiles, throughput.

Takes the timelines of one case, returns named figures; times of a timeline are seconds since the
start of the case.
"""

import numpy as np

from .workload import Timeline

PERCENTILES = (50, 90, 95, 99)
SPREAD = {"mean": np.mean, "median": np.median, "std": np.std}


def case_figures(timelines: list[Timeline]) -> dict:
    """The VisualGLM guide's columns, in ms; TokensPerSecond per sequence and second.

    The first token counts when every sequence of the batch has one. A token's time is the mean of
    the steps after that, in which all decode together (None for answers of one token).
    """
    last = max(timelines, key=lambda timeline: timeline.tokens[0])
    first_token = last.tokens[0]
    steps = len(last.tokens) - 1
    per_token = (last.tokens[-1] - first_token) / steps if steps else None
    return {
        "ResponseTime(ms)": 1000 * duration(timelines),
        "FirstTokenTime(ms)": 1000 * first_token,
        "TimePerTokens(ms)": per_token and 1000 * per_token,
        "TokensPerSecond(ms)": per_token and 1 / per_token,
        "PictureProcessTime(ms)": 1000 * picture_seconds(timelines),
    }


def picture_seconds(timelines: list[Timeline]) -> float:
    """Mean over the requests of what the vision encoder took; 0 without pictures."""
    return float(np.mean([timeline.vision for timeline in timelines]))


def duration(timelines: list[Timeline]) -> float:
    """Seconds until the last token of the case."""
    return max(timeline.tokens[-1] for timeline in timelines)


def serving_figures(timelines: list[Timeline]) -> dict:
    """vLLM's names: seconds of the whole case, throughputs per second, latencies of the requests in
    ms."""
    seconds = duration(timelines)
    requests = len(timelines)
    read = sum(timeline.input_tokens for timeline in timelines)
    produced = sum(len(timeline.tokens) for timeline in timelines)
    figures = {
        "completed": requests,
        "duration": seconds,
        "total_input_tokens": read,
        "total_output_tokens": produced,
        "request_throughput": requests / seconds,
        "output_throughput": produced / seconds,
        "total_token_throughput": (read + produced) / seconds,
        "vision_encode_ms": 1000 * picture_seconds(timelines),
    }
    for name, values in latencies(timelines).items():
        if values:
            figures |= spread(name, values)
    return figures


def latencies(timelines: list[Timeline]) -> dict[str, list[float]]:
    """vLLM's latencies in seconds: time to the first token, between tokens, to the end, and per
    output token after the first."""
    found = {"ttft": [], "itl": [], "e2el": [], "tpot": []}
    for timeline in timelines:
        tokens = timeline.tokens
        found["ttft"].append(tokens[0])
        found["itl"] += list(np.diff(tokens))
        found["e2el"].append(tokens[-1])
        if len(tokens) > 1:
            found["tpot"].append((tokens[-1] - tokens[0]) / (len(tokens) - 1))
    return found


def spread(name: str, values: list[float]) -> dict:
    """Mean, median, standard deviation and percentiles of seconds, in ms."""
    figures = {}
    for kind, measure in SPREAD.items():
        figures[f"{kind}_{name}_ms"] = 1000 * float(measure(values))
    for percent in PERCENTILES:
        figures[f"p{percent}_{name}_ms"] = 1000 * float(np.percentile(values, percent))
    return figures


def perf_info(timelines: list[Timeline]) -> dict:
    """`***Perf Info***` of the vllm_utils guides: strings with units.

    latency_per_token = latency / output length; prefill_latency_per_token is the mean time to the
    first token (the guides' name, not divided by anything).
    """
    seconds = duration(timelines)
    requests = len(timelines)
    length = len(timelines[0].tokens)
    seconds_of = latencies(timelines)
    first_token = np.mean(seconds_of["ttft"])
    info = {
        "latency_num_prompts": f"{1000 * seconds:.2f} ms",
        "latency_per_token": f"{1000 * seconds / length:.2f} ms",
        "request_per_second": f"{requests / seconds:.3f} requests/s",
        "token_per_second": f"{requests * length / seconds:.2f} tokens/s",
        "prefill_latency_per_token": f"{1000 * first_token:.2f} ms",
        "decode_latency_per_token": None,
        "decode_throughput": None,
    }
    if length > 1:
        fastest = min(seconds_of["tpot"])
        info["decode_latency_per_token"] = f"{1000 * fastest:.2f} ms"
        info["decode_throughput"] = f"{1 / fastest:.2f} tokens/s"
    if any(timeline.vision for timeline in timelines):
        info["picture_process_time"] = f"{1000 * picture_seconds(timelines):.2f} ms"
    return info
