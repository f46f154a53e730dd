"""Figures of a benchmark: averages, percentiles, throughput."""

import numpy as np

from .workload import Timeline

PERCENTILES = (50, 90, 95, 99)
SPREAD = {"mean": np.mean, "median": np.median, "std": np.std}


def case_figures(lines: list[Timeline]) -> dict:
    """The VisualGLM guide's columns, in ms. The first token counts when every sequence of the batch has one; a token's
    time is the mean of the steps after that, in which all decode together (None for answers of one token)."""
    last = max(lines, key=lambda line: line.tokens[0])
    first = last.tokens[0]
    steps = len(last.tokens) - 1
    each = (last.tokens[-1] - first) / steps if steps else None
    return {
        "ResponseTime(ms)": 1000 * max(line.tokens[-1] for line in lines),
        "FirstTokenTime(ms)": 1000 * first,
        "TimePerTokens(ms)": each and 1000 * each,
        "TokensPerSecond(ms)": each and 1 / each,
    }


def serving_figures(lines: list[Timeline]) -> dict:
    """vLLM's names: seconds of the whole case, throughputs per second, latencies of the requests in ms."""
    seconds = max(line.tokens[-1] for line in lines)
    produced = sum(len(line.tokens) for line in lines)
    read = sum(line.input_tokens for line in lines)
    between = [gap for line in lines for gap in np.diff(line.tokens)]
    spread = {
        "ttft": [line.tokens[0] for line in lines],
        "itl": between,
        "e2el": [line.tokens[-1] for line in lines],
        "tpot": [
            (x.tokens[-1] - x.tokens[0]) / (len(x.tokens) - 1) for x in lines if len(x.tokens) > 1
        ],
    }
    found = {
        "completed": len(lines),
        "duration": seconds,
        "total_input_tokens": read,
        "total_output_tokens": produced,
        "request_throughput": len(lines) / seconds,
        "output_throughput": produced / seconds,
        "total_token_throughput": (read + produced) / seconds,
        "vision_encode_ms": 1000 * float(np.mean([line.vision for line in lines])),
    }
    for name, values in spread.items():
        if values:
            found |= {
                f"{kind}_{name}_ms": 1000 * float(measure(values))
                for kind, measure in SPREAD.items()
            }
            found |= {
                f"p{p}_{name}_ms": 1000 * float(np.percentile(values, p)) for p in PERCENTILES
            }
    return found


def perf_info(lines: list[Timeline]) -> dict:
    """`***Perf Info***` of the vllm_utils guides: strings with units. latency_per_token = latency / output length;
    prefill_latency_per_token is the mean time to the first token (the guides' name, not divided by anything)."""
    seconds = max(line.tokens[-1] for line in lines)
    length = len(lines[0].tokens)
    found = {
        "latency_num_prompts": f"{1000 * seconds:.2f} ms",
        "latency_per_token": f"{1000 * seconds / length:.2f} ms",
        "request_per_second": f"{len(lines) / seconds:.3f} requests/s",
        "token_per_second": f"{len(lines) * length / seconds:.2f} tokens/s",
        "prefill_latency_per_token": f"{1000 * np.mean([line.tokens[0] for line in lines]):.2f} ms",
        "decode_latency_per_token": None,
        "decode_throughput": None,
    }
    if length > 1:
        fastest = min((line.tokens[-1] - line.tokens[0]) / (length - 1) for line in lines)
        found |= {
            "decode_latency_per_token": f"{1000 * fastest:.2f} ms",
            "decode_throughput": f"{1 / fastest:.2f} tokens/s",
        }
    return found
