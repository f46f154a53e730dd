"""Clients that break off: does the service's memory stay flat?

`python benchmarks/storm.py --seconds 3600` lets clients ask about pictures of many sizes and hang up at once, in
mid-answer or after their request. It fails when memory has grown by more than 5 %, be it in the storm (from the second
tenth of the time to the last, which holds what is under way too) or at rest (before and after it, which holds only what
stays), when requests or descriptors are left over, or when an undisturbed question is not answered afterwards.

A minute of the same storm comes first and does not count: in it every kind of request has come dozens of times, so that
all threads have begun and all that is loaded, compiled or remembered once is there.
"""

import argparse
import asyncio
import base64
import io
import json
import random
import socket
import struct
import sys
import time
from pathlib import Path

from PIL import Image
from service import HTTP, MOST_GROWTH, ROOT, Process, growth

MODEL = ROOT / "examples" / "demo" / "checkpoint"
CLIENTS = 24
WARM_UP_SECONDS = 60
REST_SECONDS = 30  # three times as long as the service keeps what was freed
SIDES = (40, 200, 600, 1500, 3000)
AT_ONCE = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets the connection


def bodies(source) -> list[bytes]:
    """Requests with pictures of all sizes, streamed and whole."""
    found = []
    for side in SIDES:
        picture = Image.effect_noise((side, side * 2 // 3), 80).convert("RGB")
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=60)
        url = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        for stream in (True, False):
            parts = [{"type": "image_url", "image_url": {"url": url}}]
            parts.append({"type": "text", "text": "Describe the picture."})
            body = {"messages": [{"role": "user", "content": parts}], "stream": stream}
            body |= {"max_tokens": source.randrange(20, 200), "ignore_eos": True}
            found.append(json.dumps(body).encode())
    return found


async def one(port: int, body: bytes, source) -> str:
    """One request that is broken off somewhere, or read to its end -> how it ended."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    head += "Content-Type: application/json\r\nConnection: close\r\n\r\n"
    end = source.choice(("reset", "half", "close", "middle", "middle", "whole"))
    if end == "half":
        body = body[: len(body) // 2]
    try:
        writer.write(head.encode() + body)
        await writer.drain()
        if end == "whole":
            await reader.read()
        elif end == "middle":
            await asyncio.wait_for(reader.read(600), source.uniform(0.1, 3))
        else:
            await asyncio.sleep(source.uniform(0, 0.3))
    except (asyncio.TimeoutError, OSError):
        pass
    if end == "reset":
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
    writer.transport.abort()
    return end


async def storm(port: int, seconds: float, seed: int, look, clients=CLIENTS) -> int:
    """`clients` of them for `seconds`; calls look() every two -> number of requests."""
    source = random.Random(seed)
    choices = bodies(source)
    end = time.monotonic() + seconds
    count = 0

    async def client():
        nonlocal count
        while time.monotonic() < end:
            await one(port, source.choice(choices), source)
            count += 1

    async def watch():
        while time.monotonic() < end:
            look()
            await asyncio.sleep(2)

    await asyncio.gather(watch(), *(client() for _ in range(clients)))
    return count


def descriptors(process: int) -> int:
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3600, help="(default: 3600)")
    parser.add_argument("--seed", type=int, default=0, help="which requests (default: 0)")
    return parser.parse_args()


def at_rest(service: Process) -> int:
    """Memory in bytes when nothing has been asked for REST_SECONDS."""
    time.sleep(REST_SECONDS)
    return service.resident


def main() -> int:
    options = parse()
    service = Process("--model", str(MODEL))
    samples = []
    try:
        service.wait()
        begin = service.resident
        port = int(service.url.rpartition(":")[2])
        look = lambda: samples.append(service.resident)  # noqa: E731
        asyncio.run(storm(port, WARM_UP_SECONDS, options.seed + 1, lambda: None))
        before = at_rest(service)
        files = -descriptors(service.process.pid)
        count = asyncio.run(storm(port, options.seconds, options.seed, look))
        after = at_rest(service)
        files += descriptors(service.process.pid)
        left = service.num_requests
        question = {"messages": [{"role": "user", "content": "Hello?"}], "max_tokens": 4}
        answered = HTTP.post(service.url + "/v1/chat/completions", json=question).status_code
    finally:
        code = service.stop()
    every = samples[:: max(len(samples) // 12, 1)]
    print(
        f"{count} requests in {options.seconds:.0f} s; memory in MiB: {begin >> 20} at the start, "
        f"in the storm {', '.join(str(each >> 20) for each in every)} ({growth(samples):+.1%}), "
        f"at rest {before >> 20} before and {after >> 20} after it ({after / before - 1:+.1%}); "
        f"{left} requests left, {files:+d} descriptors, then status {answered}, exit code {code}"
    )
    grown = max(growth(samples), after / before - 1) > MOST_GROWTH
    return int(bool(left or files > 5 or answered != 200 or code or grown))


if __name__ == "__main__":
    sys.exit(main())
