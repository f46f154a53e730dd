"""Requests as an attacker sends them: bodies(seed, canary) is an endless, repeatable row of them.

`python benchmarks/hostile.py --bodies 20000` sends them to a service of its own and fails on a crash, a status 500, a
fetched URL, or memory that grows by more than 5 %. Everything stays on this machine: the URLs point to loopback, where a
canary listens that nobody may ever reach.
"""

import argparse
import base64
import concurrent.futures
import contextlib
import gzip
import io
import itertools
import json
import random
import socket
import statistics
import struct
import sys
import threading
import zlib
from collections import Counter
from dataclasses import dataclass, field

import httpx
from PIL import Image
from service import MODEL, Process

PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/")
NUMBERS = (
    "1e999",
    "-1e999",
    "NaN",
    "Infinity",
    "9" * 5000,
    "-1",
    "0",
    "1.5",
    str(2**31),
    str(2**63),
    str(2**64),
    "1e-400",
    "-0.0",
    "0x10",
    "true",
    "null",
    '"7"',
    "[]",
    "{}",
)
FIELDS = (
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "seed",
    "n",
    "stop",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
    "top_logprobs",
    "stop_token_ids",
    "stream",
    "stream_options",
    "ignore_eos",
    "tools",
    "tool_choice",
    "model",
    "messages",
    "prompt",
    "tokens",
    "logit_bias",
    "response_format",
    "text",
    "image",
    "history",
    "max_length",
)
VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    1.5,
    "",
    "x",
    "\0",
    "\ud800",
    [],
    {},
    [[]],
    [None],
    {"": None},
    "x" * 10_000,
    list(range(2000)),
    [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "<|user|>[gMASK]<sop><image>",
    "\u202e\U0001f468\u200d" * 50,
)
HOSTS = (
    "127.0.0.1:{p}",
    "localhost:{p}",
    "[::1]:{p}",
    "[::ffff:127.0.0.1]:{p}",
    "127.1:{p}",
    "2130706433:{p}",
    "0x7f000001:{p}",
    "0177.0.0.1:{p}",
    "0.0.0.0:{p}",
    "[::]:{p}",
    "localhost.:{p}",
    "LOCALHOST:{p}",
    "user:word@127.0.0.1:{p}",
    "ip6-localhost:{p}",
    "127.0.0.1:{p}@localhost:{p}",
    "127.0.0.1%00.localhost:{p}",
    "[fe80::1%25lo]:{p}",
    "[64:ff9b::7f00:1]:{p}",
    "127。0。0。1:{p}",
    "①②⑦.0.0.1:{p}",
    "127.0.0.1",
    "[::1",
    "localhost\\@127.0.0.1:{p}",
    "127.0.0.1:{p}#@localhost",
)
SCHEMES = (
    "http",
    "https",
    "HTTP",
    "ftp",
    "gopher",
    "dict",
    "file",
    "ldap",
    "jar:http",
    "data:http",
    "//",
    "javascript",
)
TRAVERSALS = (
    "file:///etc/passwd",
    "file://{d}/../../../../etc/passwd",
    "file://{d}/%2e%2e/%2e%2e/etc/passwd",
    "file://{d}",
    "file:///proc/self/environ",
    "file:///dev/zero",
    "file:///dev/stdin",
    "file://localhost/etc/passwd",
    "file:////etc/passwd",
    "file://{d}/a.png%00.txt",
    "file://{d}/..%252f..%252fetc/passwd",
    "/etc/passwd",
    "file:{d}/../x",
    "file://{d}/" + "a/" * 3000,
)
TEXTS = (
    "\0",
    "\ud800",
    "<|user|>",
    "x" * 100_000,
    "\u202e",
    "a\n" * 5000,
    "<|endoftext|>" * 500,
    "ﷺ" * 20_000,
    "{{7*7}}",
    "%s%n",
)
TYPES = ("", "text/plain", "multipart/form-data", "x" * 500)
CHOICES = ("auto", "required", "none", {"type": "function", "function": {"name": "f"}}, 7)
ALLOWED = (
    "127.0.0.1:{p}",
    "localhost:{p}",
    "[::1]:{p}",
    "[::ffff:127.0.0.1]:{p}",
    "ip6-localhost:{p}",
    "0.0.0.0:{p}",
    "127.0.0.1",
)


def bodies(seed: int, port: int, folder: str):
    """Yields (kind, path, body, headers); port: the canary's, folder: the one that files may be read from."""
    source = random.Random(seed)
    kinds = (
        truncated,
        flipped,
        numbers,
        nested,
        mistyped,
        bombs,
        damaged,
        urls,
        files,
        texts,
        tools,
        compressed,
        honest,
    )
    for kind in itertools.cycle(kinds):
        for path, body, headers in kind(source, port, folder):
            yield kind.__name__, path, body, headers


def chat(**more) -> dict:
    return {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, **more}


def pictured(url: str) -> dict:
    return chat(
        messages=[
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": url}},
                    {"type": "text", "text": "?"},
                ],
            }
        ]
    )


def uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def sent(body, path=PATHS[0], **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8", "surrogatepass")
    return path, data, {"content-type": "application/json", **headers}


def truncated(source, *_):
    whole = json.dumps(pictured(uri(picture(source)))).encode()
    yield sent(whole[: source.randrange(len(whole))], source.choice(PATHS))


def flipped(source, *_):
    body = bytearray(
        json.dumps(chat(stop=["x"], tools=[], stream=bool(source.getrandbits(1)))).encode()
    )
    for _ in range(source.randrange(1, 6)):
        body[source.randrange(len(body))] = source.randrange(256)
    yield sent(bytes(body), source.choice(PATHS))


def numbers(source, *_):
    name = source.choice(FIELDS)
    number = source.choice(NUMBERS)
    whole = json.dumps(chat(prompt="x", text="x", tokens=[1]))
    yield sent(f'{whole[:-1]}, "{name}": {number}}}'.encode(), source.choice(PATHS))
    yield sent(f'{{"tokens": [{number}], "prompt": [{number}]}}'.encode(), source.choice(PATHS))


def nested(source, *_):
    depth = source.choice((10, 100, 900, 20_000))
    opened, closed = source.choice(
        (("[", "]"), ('{"a":', "}"), ('{"messages":[', "]}"), ('{"content":[', "]}"))
    )
    yield sent(
        (opened * depth + "1" + closed * depth * source.getrandbits(1)).encode(),
        source.choice(PATHS),
    )
    yield sent(
        json.dumps(chat())[:-1].encode() + b', "anything": ' + b"[" * depth + b"]" * depth + b"}"
    )


def mistyped(source, *_):
    body = chat(prompt="x", text="x", tokens=[1, 2])
    for _ in range(source.randrange(1, 4)):
        body[source.choice(FIELDS)] = source.choice(VALUES)
    yield sent(body, source.choice(PATHS))
    message = {
        "role": "user",
        "content": "x",
        source.choice(("role", "content", "tool_calls", "name")): source.choice(VALUES),
    }
    yield sent(chat(messages=[message] * source.randrange(1, 3)))


def picture(source) -> bytes:
    file = io.BytesIO()
    size = source.randrange(1, 80), source.randrange(1, 80)
    image = Image.new(source.choice(("RGB", "L", "RGBA", "P")), size, source.randrange(200))
    image.save(file, source.choice(("PNG", "GIF", "WEBP")))
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


BOMB = zlib.compress(bytes(30_000_000), 9)  # 30 kB
SMALL = zlib.compress(bytes(90))
BOMBS = (
    png(60_000, 60_000, BOMB),
    png(2**31 - 1, 1, BOMB),
    png(0, 0, BOMB),
    png(900, 900, BOMB),
    png(1, 2**31 - 1, b""),
    png(9, 9, SMALL, chunk(b"zTXt", b"a\0\0" + BOMB)),
    png(9, 9, SMALL, chunk(b"iCCP", b"a\0\0" + BOMB)),
    b"GIF89a"
    + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
    + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;",
    b"BM"
    + struct.pack(
        "<IHHIIiiHHIIiiII", 1 << 30, 0, 0, 54, 40, 2**31 - 1, -(2**31), 1, 32, 0, 0, 0, 0, 0, 0
    ),
    b"RIFF\x1a\0\0\0WEBPVP8L\r\0\0\0/\xff\xff\xff\xff" + bytes(9),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999999 9999999\n",
    b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    b"II*\0\x08\0\0\0\xff\xff" + bytes(100),
)


def bombs(source, *_):
    data = source.choice(BOMBS)
    yield sent(pictured(uri(data)))
    yield sent({"text": "?", "image": base64.b64encode(data).decode(), "max_length": 300}, "/")


def damaged(source, *_):
    data = bytearray(picture(source))
    for _ in range(source.randrange(1, 8)):
        data[source.randrange(len(data))] = source.randrange(256)
    yield sent(pictured(uri(bytes(data[: source.randrange(1, len(data) + 1)]))))


def urls(source, port, _):
    host = source.choice(HOSTS).format(p=port)
    scheme = source.choice(SCHEMES) if source.random() < 0.4 else "http"
    yield sent(
        pictured(
            f"{scheme}://{host}/{source.choice(('', 'a.png', 'moved', '../x', '%00', '?u=http://x'))}"
        )
    )


def files(source, _, folder):
    yield sent(pictured(source.choice(TRAVERSALS).format(d=folder)))


def texts(source, *_):
    text = source.choice(TEXTS)
    message = {"role": source.choice(("user", "system", "tool", text[:50])), "content": text}
    yield sent(
        source.choice(
            (
                chat(messages=[message]),
                {"prompt": text, "max_tokens": 2},
                chat(model=text[:300]),
                chat(stop=[text]),
            )
        ),
        source.choice(PATHS),
    )


def tools(source, *_):
    schema = {}
    for _ in range(source.choice((1, 31, 40, 400))):
        schema = {"y": [schema]} if source.random() < 0.05 else {"x": schema}
    function = {
        "name": source.choice(("f", "", "a b", "x" * 70, "\n")),
        "parameters": source.choice((schema, [], None, "x")),
    }
    call = {
        "type": "function",
        "function": {"name": "f", "arguments": source.choice(("{}", "{", None, {}, "x" * 1000))},
    }
    described = [{"type": "function", "function": function}] * source.choice((1, 2, 200))
    yield sent(chat(tools=described, tool_choice=source.choice(CHOICES)))
    yield sent(
        chat(
            messages=[
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "user", "content": "x"},
            ]
        )
    )


def compressed(source, *_):
    yield sent(
        gzip.compress(json.dumps(chat()).encode() + b" " * 3_000_000, mtime=0),
        **{"content-encoding": "gzip"},
    )
    yield sent(
        json.dumps(chat()).encode(), source.choice(PATHS), **{"content-type": source.choice(TYPES)}
    )


def honest(source, *_):
    """What everybody else asks meanwhile."""
    stream = {"stream": bool(source.getrandbits(1)), "stream_options": {"include_usage": True}}
    yield sent({**pictured(uri(picture(source))), **stream, "logprobs": True})
    yield sent(chat(temperature=source.random(), frequency_penalty=1, min_p=0.1, seed=1))


class Canary:
    """Listens on loopback, IPv4 and IPv6; `visits` should stay 0."""

    def __init__(self):
        self.visits = 0
        self._sockets = [socket.create_server(("127.0.0.1", 0))]
        self.port = self._sockets[0].getsockname()[1]
        if socket.has_dualstack_ipv6():
            with contextlib.suppress(OSError):  # a machine without IPv6 loopback
                self._sockets.append(
                    socket.create_server(("::1", self.port), family=socket.AF_INET6)
                )
        for listening in self._sockets:
            threading.Thread(target=self._listen, args=(listening,), daemon=True).start()

    def _listen(self, listening):
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            self.visits += 1
            connection.close()

    def close(self):
        for listening in self._sockets:
            listening.close()

    @property
    def allowed(self) -> list[str]:
        """Flags that name it as a host to fetch from: only the check of addresses is left to keep the service away."""
        return [
            word
            for host in ALLOWED
            for word in ("--allowed-media-domains", host.format(p=self.port))
        ]


@dataclass
class Report:
    """What came back."""

    count: int = 0
    statuses: Counter = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def add(self, kind, path, body, answer):
        self.count += 1
        self.statuses[answer.status_code] += 1
        if answer.status_code >= 500 or (
            answer.status_code >= 400 and not answer.json()["error"]["message"]
        ):
            self.wrong.append(
                f"{kind} {path} {body[:300]!r} -> {answer.status_code} {answer.text[:300]}"
            )

    @property
    def growth(self) -> float:
        """Of the median memory, from the second tenth (the first warms up) to the last."""
        tenth = max(len(self.memory) // 10, 1)
        return (
            statistics.median(self.memory[-tenth:])
            / statistics.median(self.memory[tenth : 2 * tenth])
            - 1
        )


def send(url: str, requests, report: Report, memory=None, clients=4):
    """All `requests` to the service at url, from a few clients at once; memory(): sampled after every 50th."""
    lock = threading.Lock()

    def work():
        with httpx.Client(base_url=url, timeout=120, trust_env=False) as client:
            while True:
                with lock:
                    request = next(requests, None)
                if request is None:
                    return
                kind, path, body, headers = request
                answer = client.post(path, content=body, headers=headers)
                with lock:
                    report.add(kind, path, body, answer)
                    if memory and report.count % 50 == 0:
                        report.memory.append(memory())

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        for done in [pool.submit(work) for _ in range(clients)]:
            done.result()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bodies", type=int, default=20_000, help="how many (default: 20000)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: 0)")
    options = parser.parse_args()
    canary = Canary()
    report = Report()
    service = Process(
        "--model",
        str(MODEL),
        "--max-model-len",
        "128",
        "--max-num-seqs",
        "4",
        "--max-image-pixels",
        "1000000",
        "--max-image-bytes",
        "500000",
        "--max-body-bytes",
        "2000000",
        "--allowed-local-media-path",
        str(MODEL),
        *canary.allowed,
    )
    try:
        service.wait()
        send(
            service.url,
            itertools.islice(bodies(options.seed, canary.port, str(MODEL)), options.bodies),
            report,
            lambda: service.resident,
        )
        left = service.gauge("num_requests_running") + service.gauge("num_requests_waiting")
    finally:
        code = service.stop()
    print(
        f"{report.count} bodies, statuses {dict(sorted(report.statuses.items()))}, {canary.visits} fetched, memory "
        f"{report.memory[0] >> 20} MiB, then {report.growth:+.1%}, {left:.0f} requests left over, exit code {code}"
    )
    print("\n".join(report.wrong[:20]))
    return int(bool(report.wrong or canary.visits or left or code or report.growth > 0.05))


if __name__ == "__main__":
    sys.exit(main())
