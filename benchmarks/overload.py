"""The service at twice the rate that it can keep up with: what it refuses, what it answers, how long that takes.

`python benchmarks/overload.py --seconds 600` measures the sustainable rate first (as many clients as sequences, none
waiting), then sends mixed requests at twice that rate, whether or not earlier ones are answered. It fails when the queue
outgrows its bound, an answer is not whole, a refusal is not a 429 with Retry-After, or anything is left over. One process
on 127.0.0.1 serves, this one asks; both share the machine's cores.
"""

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter

import httpx
from hostile import chat, picture, pictured, uri
from service import MODEL, Process

SEQUENCES, QUEUE = 4, 16


def question(source) -> dict:
    """Short and long, with and without a picture, whole and streamed."""
    body = chat(messages=[{"role": "user", "content": "word " * source.randrange(1, 60)}])
    if source.random() < 0.25:
        body = pictured(uri(picture(source)))
    stream = (
        {"stream": True, "stream_options": {"include_usage": True}} if source.random() < 0.5 else {}
    )
    return {
        **body,
        "max_tokens": source.randrange(4, 64),
        "ignore_eos": True,
        "temperature": 0,
        **stream,
    }


class Asked:
    """What became of the requests."""

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
            if tokens(answer, "stream" in body) != body["max_tokens"]:
                self.wrong.append(f"not whole: {answer.text[-200:]}")
        elif (
            answer.status_code != 429
            or not answer.headers.get("retry-after")
            or "error" not in answer.json()
        ):
            self.wrong.append(f"status {answer.status_code}: {answer.text[:200]}")


def tokens(answer, streamed: bool) -> int:
    if not streamed:
        return answer.json()["usage"]["completion_tokens"]
    *_, last, done = answer.text.strip().split("\n\n")
    return json.loads(last[6:])["usage"]["completion_tokens"] if done == "data: [DONE]" else -1


async def sustainable(client, seconds: float, source) -> float:
    """Requests per second with every sequence busy and none waiting."""
    asked = Asked(client)
    end = time.monotonic() + seconds

    async def one_client():
        while time.monotonic() < end:
            await asked.ask(question(source))

    begun = time.monotonic()
    await asyncio.gather(*(one_client() for _ in range(SEQUENCES)))
    return asked.statuses[200] / (time.monotonic() - begun)


async def overload(
    client, rate: float, seconds: float, source, service
) -> tuple[Asked, int, float]:
    """Poisson arrivals -> what became of them, how many were sent, the most that waited."""
    asked = Asked(client)
    tasks = []
    longest = 0.0
    end = time.monotonic() + seconds
    due = look = time.monotonic()
    while due < end:
        await asyncio.sleep(max(due - time.monotonic(), 0))
        tasks.append(asyncio.create_task(asked.ask(question(source))))
        due += source.expovariate(rate)
        if time.monotonic() > look:
            waiting = await asyncio.to_thread(service.gauge, "num_requests_waiting")
            longest = max(longest, waiting)
            look = time.monotonic() + 0.5
    await asyncio.gather(*tasks)
    return asked, len(tasks), longest


async def measure(
    service, warm: float, seconds: float, seed: int, queue=QUEUE, factor=2
) -> tuple[str, bool]:
    """Overload by `factor` -> one line of figures, and whether all of it is as it should be. queue: what may wait."""
    source = random.Random(seed)
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=SEQUENCES + QUEUE)
    async with httpx.AsyncClient(
        base_url=service.url, timeout=300, limits=limits, trust_env=False
    ) as client:
        await sustainable(client, warm / 4, source)  # warms up
        rate = await sustainable(client, warm, source)
        asked, sent, longest = await overload(client, factor * rate, seconds, source, service)
    left = [
        service.gauge(name)
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    ]
    took = sorted(asked.seconds)
    lost = sent - sum(asked.statuses.values())
    line = (
        f"sustainable {rate:.2f}/s; {sent} sent in {seconds:.0f} s at {factor * rate:.2f}/s: {dict(asked.statuses)}, "
        f"{lost} lost, at most {longest:.0f} waiting; answered {len(took) / seconds:.2f}/s, "
        f"p50 {took[len(took) // 2]:.2f} s, p99 {took[int(len(took) * 0.99)]:.2f} s"
    )
    fine = (
        not (asked.wrong or lost or any(left))
        and longest <= queue
        and asked.statuses[429]
        and asked.statuses[200]
    )
    return "\n".join([line, *asked.wrong[:20]]), bool(fine)


def main() -> int:
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
    options = parser.parse_args()
    service = Process(
        "--model",
        str(MODEL),
        "--max-model-len",
        "512",
        "--max-num-seqs",
        str(SEQUENCES),
        "--max-queue",
        str(QUEUE),
    )
    try:
        service.wait()
        line, fine = asyncio.run(measure(service, options.warm, options.seconds, options.seed))
    finally:
        code = service.stop()
    print(f"{line}\nexit code {code}")
    return int(not fine or bool(code))


if __name__ == "__main__":
    sys.exit(main())
