"""Sends a service twice the requests per second that it can answer, and reports how it copes.

`python benchmarks/overload.py --seconds 600` measures the sustainable rate first (as many clients as sequences, none
waiting), then sends mixed requests at twice that rate, whether or not earlier ones are answered. It fails when the
queue outgrows its bound, an answer is incomplete, a refusal is not a 429 with Retry-After, or a request is lost or
left over. The service is a process on 127.0.0.1, this program its client; both share the machine's cores.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter

import httpx
from hostile_bodies import chat, chat_about, data_uri, small_image
from service import MODEL, Process

SEQUENCES = 4
QUEUE = 16
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


def question(source) -> dict:
    """A random request body: short or long, with or without an image, whole or streamed."""
    body = chat(messages=[{"role": "user", "content": "word " * source.randrange(1, 60)}])
    if source.random() < 0.25:
        body = chat_about(data_uri(small_image(source)))
    if source.random() < 0.5:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body | {"max_tokens": source.randrange(4, 64), "ignore_eos": True, "temperature": 0}


class Outcomes:
    """Sends requests and counts their results. `seconds`: of each complete answer. `wrong`: what must not happen."""

    def __init__(self, client):
        self.client = client
        self.statuses = Counter()
        self.seconds = []
        self.wrong = []

    async def ask(self, body: dict):
        begun = time.perf_counter()
        answer = await self.client.post("/v1/chat/completions", json=body)
        self.statuses[answer.status_code] += 1
        if answer.status_code == 200:
            self.seconds.append(time.perf_counter() - begun)
            if num_tokens(answer, "stream" in body) != body["max_tokens"]:
                self.wrong.append(f"not whole: {answer.text[-200:]}")
        elif not is_proper_refusal(answer):
            self.wrong.append(f"status {answer.status_code}: {answer.text[:200]}")


def is_proper_refusal(answer) -> bool:
    if answer.status_code != 429 or not answer.headers.get("retry-after"):
        return False
    return "error" in answer.json()


def num_tokens(answer, streamed: bool) -> int:
    """Tokens of a complete answer, by its usage; -1 for a stream without its end."""
    if not streamed:
        return answer.json()["usage"]["completion_tokens"]
    *_, last, done = answer.text.strip().split("\n\n")
    if done != "data: [DONE]":
        return -1
    return json.loads(last.removeprefix("data: "))["usage"]["completion_tokens"]


async def sustainable(client, seconds: float, source) -> float:
    """Requests per second with every sequence busy and none waiting."""
    outcomes = Outcomes(client)
    end = time.monotonic() + seconds

    async def one_client():
        while time.monotonic() < end:
            await outcomes.ask(question(source))

    begun = time.monotonic()
    await asyncio.gather(*(one_client() for _ in range(SEQUENCES)))
    return outcomes.statuses[200] / (time.monotonic() - begun)


async def overload(client, rate, seconds, source, service) -> tuple[Outcomes, int, float]:
    """Sends requests with Poisson arrivals -> (outcomes, number sent, largest number seen waiting)."""
    outcomes = Outcomes(client)
    tasks = []
    most_waiting = 0.0
    end = time.monotonic() + seconds
    next_request = next_look = time.monotonic()
    while next_request < end:
        await asyncio.sleep(max(next_request - time.monotonic(), 0))
        tasks.append(asyncio.create_task(outcomes.ask(question(source))))
        next_request += source.expovariate(rate)
        if time.monotonic() > next_look:
            waiting = await asyncio.to_thread(service.gauge, "num_requests_waiting")
            most_waiting = max(most_waiting, waiting)
            next_look = time.monotonic() + 0.5
    await asyncio.gather(*tasks)
    return outcomes, len(tasks), most_waiting


async def measure(
    service, warm: float, seconds: float, seed: int, queue=QUEUE, factor=2
) -> tuple[str, bool]:
    """Overloads the service by `factor` -> (lines of figures, whether all is as it should be).

    warm: seconds that the sustainable rate is measured; queue: how many requests may wait.
    """
    source = random.Random(seed)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=SEQUENCES + QUEUE)
    async with httpx.AsyncClient(
        base_url=service.url, timeout=300, limits=limits, trust_env=False
    ) as client:
        await sustainable(client, warm / 4, source)  # warms up
        rate = await sustainable(client, warm, source)
        outcomes, sent, waiting = await overload(client, factor * rate, seconds, source, service)
    left = any(service.gauge(name) for name in GAUGES)
    statuses = outcomes.statuses
    lost = sent - sum(statuses.values())
    line = (
        f"sustainable {rate:.2f}/s; {sent} sent in {seconds:.0f} s at {factor * rate:.2f}/s: "
        f"{dict(statuses)}, {lost} lost, at most {waiting:.0f} waiting; "
        f"{latency(outcomes.seconds, seconds)}"
    )
    clean = not (outcomes.wrong or lost or left) and waiting <= queue
    both_kinds = statuses[429] > 0 and statuses[200] > 0
    return "\n".join([line, *outcomes.wrong[:20]]), clean and both_kinds


def latency(times: list[float], seconds: float) -> str:
    """Answers per second and percentiles of the times per answer, as text."""
    times = sorted(times)
    p50 = times[len(times) // 2]
    p99 = times[int(len(times) * 0.99)]
    return f"answered {len(times) / seconds:.2f}/s, p50 {p50:.2f} s, p99 {p99:.2f} s"


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=600, help="of overload (default: 600)")
    parser.add_argument(
        "--warm",
        type=float,
        default=20,
        help="seconds that the sustainable rate is measured (default: 20)",
    )
    parser.add_argument("--seed", type=int, default=0, help="which requests (default: 0)")
    return parser.parse_args()


def main() -> int:
    options = parse()
    limits = ["--max-num-seqs", str(SEQUENCES), "--max-queue", str(QUEUE)]
    service = Process("--model", str(MODEL), "--max-model-len", "512", *limits)
    try:
        service.wait()
        line, fine = asyncio.run(measure(service, options.warm, options.seconds, options.seed))
    finally:
        code = service.stop()
    print(f"{line}\nexit code {code}")
    return int(not fine or bool(code))


if __name__ == "__main__":
    sys.exit(main())
