"""The service as clients see it: a real server process, openai-python and httpx; golden checkpoints, greedy answers."""
import base64
import concurrent.futures
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = Path(__file__).parent / "golden"
PICTURE = GOLDEN / "visualglm" / "image.png"
FIXED = ["--vision", "torch", "--dtype", "float32"]
LENGTH = 900


class Server:
    """`python -m runtime.serve` on a free port; what it prints is kept."""

    def __init__(self, *argv, wait=True):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.printed = f"http://127.0.0.1:{self.port}", []
        self.process = subprocess.Popen([sys.executable, "-m", "runtime.serve", "--port", str(self.port), *FIXED, *argv],
                                        cwd=ROOT, stderr=subprocess.PIPE, text=True,
                                        env={**os.environ, "OMP_NUM_THREADS": "1"})
        self._reader = threading.Thread(target=lambda: self.printed.extend(self.process.stderr), daemon=True)
        self._reader.start()
        if wait:
            self.wait()

    def wait(self):
        end = time.monotonic() + 120
        while True:
            assert time.monotonic() < end and self.process.poll() is None, "".join(self.printed)
            try:
                if httpx.get(self.url + "/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.1)

    def post(self, path, body=None, **more):
        return httpx.post(self.url + path, json=body, timeout=120, **more)

    def client(self, **more):
        return openai.OpenAI(base_url=self.url + "/v1", api_key="any", max_retries=0, **more)

    def gauge(self, name) -> float:
        lines = httpx.get(self.url + "/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"ascend_vlm:{name}{{"))

    def until(self, name, value, seconds=20):
        end = time.monotonic() + seconds
        while self.gauge(name) != value:
            assert time.monotonic() < end, f"{name} is {self.gauge(name)}, not {value}"
            time.sleep(0.02)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        code = self.process.wait(60)
        self._reader.join()
        return code


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "a.png").write_bytes(PICTURE.read_bytes())
    (folder / "out.png").symlink_to(PICTURE)
    running = Server("--model", str(GOLDEN / "glm_edge_v"), "--max-model-len", "1024", "--max-num-seqs", "4",
                     "--served-model-name", "edge", "--allowed-local-media-path", str(folder), "--limit-images", "2",
                     "--max-image-pixels", "1000000", "--max-image-bytes", "200000", "--max-body-bytes", "1000000")
    running.folder = folder
    yield running
    running.stop()


@pytest.fixture(scope="module")
def narrow():
    """One request at a time, no queue, an API key."""
    running = Server("--model", str(GOLDEN / "visualglm"), "--max-num-seqs", "1", "--max-queue", "0", "--api-key", "secret")
    yield running
    running.stop()


KEY = {"Authorization": "Bearer secret"}


def data_uri(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


def png(width, height, colour=(200, 30, 60)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def about(url, text="描述图片"):
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]}]


def asked(text="hello", **more):
    return {"messages": [{"role": "user", "content": text}], "max_tokens": 12, "temperature": 0,
            "repetition_penalty": 1, "ignore_eos": True, **more}


def ask(client, messages, stream=False, **more):
    extra = {"repetition_penalty": 1, "ignore_eos": True, **more.pop("extra", {})}
    return client.chat.completions.create(model="edge", messages=messages, temperature=0, stream=stream,
                                          **{"max_tokens": 12, **more}, extra_body=extra)


@pytest.fixture(scope="module")
def engine():
    from runtime import Engine
    return Engine(GOLDEN / "glm_edge_v", vision="torch", dtype="float32", max_model_len=1024, max_num_seqs=1)


def expected(engine, messages, tokens=12, stop=()):
    from runtime import SamplingParams
    [result] = engine.generate([engine.prompt(messages)], SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True,
                                                                         repetition_penalty=1.0, stop=stop))
    return result


def test_text_equals_the_engine(server, engine):
    messages = [{"role": "user", "content": "你好"}]
    result, answer = expected(engine, messages), ask(server.client(), messages)
    assert answer.choices[0].message.content == result.text and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12 and answer.usage.total_tokens == result.metrics["prompt_tokens"] + 12
    parts = [{"role": "user", "content": [{"type": "text", "text": "你好"}]}]
    assert ask(server.client(), parts, max_completion_tokens=3).usage.completion_tokens == 3


def test_picture_equals_the_engine(server, engine):
    content = [{"type": "image", "image": str(PICTURE)}, {"type": "text", "text": "描述图片"}]
    text = expected(engine, [{"role": "user", "content": content}]).text
    for url in (data_uri(PICTURE.read_bytes()), (server.folder / "a.png").as_uri()):
        assert ask(server.client(), about(url)).choices[0].message.content == text


def test_stream(server):
    messages = [{"role": "user", "content": "hello"}]
    whole = ask(server.client(), messages)
    chunks = list(ask(server.client(), messages, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices == []
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == 12 and len({c.id for c in chunks}) == 1
    raw = server.post("/v1/chat/completions", asked(stream=True))
    assert raw.headers["content-type"].startswith("text/event-stream") and raw.text.endswith("data: [DONE]\n\n")


def test_stop_strings_and_seed(server, engine):
    messages = [{"role": "user", "content": "hello"}]
    text = ask(server.client(), messages).choices[0].message.content
    cut = ask(server.client(), messages, stop=[text[3:5]]).choices[0]
    assert cut.finish_reason == "stop" and cut.message.content == expected(engine, messages, stop=(text[3:5],)).text
    assert len(cut.message.content) <= text.index(text[3:5])
    same = [server.post("/v1/chat/completions", asked(temperature=1, seed=7)).json()["choices"] for _ in range(2)]
    assert same[0] == same[1]


def test_logprobs(server):
    messages = [{"role": "user", "content": "hello"}]
    rows = ask(server.client(), messages, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(rows) == 12 and all(len(row.top_logprobs) == 3 for row in rows)
    assert all(row.logprob == row.top_logprobs[0].logprob <= 0 for row in rows)     # greedy: the likeliest
    chunks = ask(server.client(), messages, stream=True, logprobs=True)
    parts = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert [row.logprob for part in parts for row in part] == pytest.approx([row.logprob for row in rows], abs=1e-4)


def test_completions_and_tokens(server):
    ids = server.post("/tokenize", {"prompt": "hello world"}).json()
    assert ids["count"] == len(ids["tokens"]) > 0 and ids["max_model_len"] == 1024
    assert server.post("/detokenize", {"tokens": ids["tokens"]}).json()["prompt"] == "hello world"
    client, same = server.client().completions, {"model": "edge", "temperature": 0, "max_tokens": 5}
    by_text = client.create(prompt="hello world", logprobs=2, **same)
    assert client.create(prompt=ids["tokens"], **same).choices[0].text == by_text.choices[0].text
    assert len(by_text.choices[0].logprobs.tokens) == by_text.usage.completion_tokens
    assert "".join(c.choices[0].text for c in client.create(prompt="hello world", stream=True, **same)) \
        == by_text.choices[0].text
    messages = server.post("/tokenize", {"messages": asked()["messages"]}).json()
    assert messages["count"] == server.post("/v1/chat/completions", asked()).json()["usage"]["prompt_tokens"]


def test_helpers(server):
    client = server.client()
    assert [(m.id, m.max_model_len) for m in client.models.list()] == [("edge", 1024)]
    assert client.models.retrieve("edge").object == "model"
    assert httpx.get(server.url + "/version").json()["version"]
    metrics = httpx.get(server.url + "/metrics").text
    for name in ("num_requests_running", "generation_tokens_total", "time_to_first_token_seconds_count",
                 "vision_encode_seconds_count", "request_success_total"):
        assert f'ascend_vlm:{name}{{' in metrics


BIG = "word " * 2000
DAMAGED = png(300, 300)[:-40]


@pytest.mark.parametrize(("body", "status", "word"), [
    (asked(model="other"), 404, "'other' does not exist"), (asked(n=2), 400, "n is not supported"),
    (asked(tools=[{"type": "function"}]), 400, "tools is not supported"), (asked(min_p=0.1), 400, "min_p"),
    (asked(presence_penalty=0.5), 400, "presence_penalty"), (asked(response_format={"type": "json_object"}), 400, "response"),
    (asked(logit_bias={"5": 1}), 400, "logit_bias"), (asked(stop_token_ids=[5]), 400, "stop_token_ids"),
    (asked(temperature=-1), 400, "temperature"), (asked(top_p=0), 400, "top_p"), (asked(max_tokens=0), 400, "max_tokens"),
    (asked(max_tokens=2000), 400, "maximum context length"), (asked(BIG), 400, "maximum context length"),
    (asked("x" * 500_000), 400, "maximum context length"), (asked(stop=[""]), 400, "stop"), (asked(seed=2 ** 70), 400, "seed"),
    ({"messages": []}, 400, "messages"), ({}, 400, "messages"), (asked(max_completion_tokens=0), 400, "max_completion_tokens"),
    ({"messages": [{"role": "judge", "content": "x"}]}, 400, "role"), ({"messages": [{"role": "user"}]}, 400, "content"),
    ({"messages": about("http://127.0.0.1/a.png")}, 400, "fetches no URL"), ({"messages": about("/etc/passwd")}, 400, "fetch"),
    ({"messages": about("file:///etc/passwd")}, 400, "not one that this server may read"),
    ({"messages": about("data:image/png;base64,@@@")}, 422, "base64"), ({"messages": about(data_uri(b"GIF"))}, 422, "read"),
    ({"messages": about(data_uri(DAMAGED))}, 422, "damaged"), ({"messages": about(data_uri(png(2000, 600)))}, 413, "pixels"),
    ({"messages": about(data_uri(png(9, 9) + b"0" * 200_000))}, 413, "bytes"), (asked("x" * 1_000_001), 413, "body exceeds"),
    ({"messages": about(data_uri(png(9, 9))) * 3}, 400, "3 pictures"),
])
def test_mistakes(body, status, word, server):
    for more in ({}, {"stream": True}):
        got = server.post("/v1/chat/completions", {**body, **more})
        error = got.json()["error"]
        assert got.status_code == status and word in error["message"], error
        assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 600
    assert server.gauge("num_requests_running") == server.gauge("num_requests_waiting") == 0


def test_files_outside_the_folder(server):
    for url in ((server.folder / "out.png").as_uri(), f"file://{server.folder}/../x.png", f"file://{server.folder}",
                f"file://{server.folder}/%2e%2e/%2e%2e/etc/passwd", "file:///%00"):
        got = server.post("/v1/chat/completions", {"messages": about(url)})
        assert got.status_code == 400 and "may read" in got.json()["error"]["message"], url


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"messages": ' + b"9" * 5000 + b"}",
                                  b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b"\xff\xfe",
                                  b'{"messages": NaN}'])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/"])
def test_hostile_bodies(body, path, server):
    got = server.post(path, content=body, headers={"content-type": "application/json"})
    assert got.status_code == 400 and got.json()["error"]["message"], got.text


def test_infinite_temperature(server):
    body = json.dumps(asked(temperature=float("inf")))
    got = server.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert got.status_code == 400 and got.json()["error"]["param"] == "temperature"


def test_wrong_paths_and_openai_errors(server):
    assert httpx.get(server.url + "/v2").json()["error"]["type"] == "not_found_error"
    assert httpx.get(server.url + "/v1/chat/completions").status_code == 405
    with pytest.raises(openai.NotFoundError):
        server.client().chat.completions.create(model="no", messages=asked()["messages"])
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server.client(), asked(BIG)["messages"])
    assert caught.value.code == "context_length_exceeded"


def test_many_at_once_answer_as_alone(server, engine):
    """Sixteen clients, unequal prompts and lengths, some with a picture; four run together, the others wait."""
    cases = [(f"{'你好 world ' * (i % 5)}{i}", 3 + 7 * (i % 6), i % 4 == 0) for i in range(16)]

    def content(i, with_picture, kind):
        file = png(40, 30, (i * 9, 30, 60))
        picture = {"type": "image_url", "image_url": {"url": data_uri(file)}} if kind == "url" else \
            {"type": "image", "image": Image.open(io.BytesIO(file))}
        return [*([picture] * with_picture), {"type": "text", "text": cases[i][0]}]
    alone = [expected(engine, [{"role": "user", "content": content(i, picture, "pil")}], tokens).text
             for i, (_, tokens, picture) in enumerate(cases)]
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        together = pool.map(lambda i: ask(server.client(), [{"role": "user", "content": content(i, cases[i][2], "url")}],
                                          max_tokens=cases[i][1]).choices[0].message.content, range(16))
        assert list(together) == alone
    server.until("kv_cache_usage_perc", 0)


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_goes_away_frees_its_blocks(stream, server):
    before = server.gauge("request_success_total")
    body = asked(max_tokens=LENGTH, stream=stream)
    with httpx.Client(timeout=0.5 if not stream else 60) as client:
        if stream:
            with client.stream("POST", server.url + "/v1/chat/completions", json=body) as response:
                lines = response.iter_lines()
                assert [next(lines) for _ in range(4)][0].startswith("data: ")
                assert server.gauge("num_requests_running") == 1
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(server.url + "/v1/chat/completions", json=body)
    server.until("num_requests_running", 0, seconds=2)
    assert server.gauge("kv_cache_usage_perc") == 0 and server.gauge("request_success_total") == before + 1


def test_key_and_queue(narrow):
    assert narrow.post("/v1/chat/completions", asked()).status_code == 401
    wrong = httpx.get(narrow.url + "/v1/models", headers={"Authorization": "Bearer secre"})
    assert wrong.status_code == 401 and wrong.json()["error"]["code"] == "invalid_api_key"
    url = narrow.url + "/v1/chat/completions"
    with httpx.stream("POST", url, json=asked(max_tokens=1500, stream=True), headers=KEY, timeout=60) as first:
        lines = first.iter_lines()
        assert first.status_code == 200 and next(lines)
        full = narrow.post("/v1/chat/completions", asked(), headers=KEY)
        assert full.status_code == 429 and full.headers["retry-after"] and full.json()["error"]["type"] == "rate_limit_error"
    for _ in range(100):
        if narrow.post("/v1/chat/completions", asked(), headers=KEY).status_code == 200:
            return
        time.sleep(0.05)
    pytest.fail("the place was not given back")


def test_legacy_route(narrow):
    image = base64.b64encode(PICTURE.read_bytes()).decode()
    body = {"image": image, "text": "描述这张图片。", "history": [], "max_length": 60, "temperature": 0}
    first = narrow.post("/", body, headers=KEY).json()
    assert first["status"] == 200 and first["history"] == [["描述这张图片。", first["result"]]] and first["time"]
    more = narrow.post("/", {**body, "text": "and", "history": first["history"], "max_length": 100}, headers=KEY).json()
    assert len(more["history"]) == 2 and more["history"][1] == ["and", more["result"]]
    assert narrow.post("/", {**body, "image": "@"}, headers=KEY).status_code == 422


def test_loading_then_graceful_end(request):
    """503 while it loads; SIGTERM lets an answer finish within the time it has."""
    server = Server("--model", str(GOLDEN / "visualglm"), "--shutdown-seconds", "10", wait=False)
    request.addfinalizer(server.process.kill)
    statuses, end = set(), time.monotonic() + 60
    while 200 not in statuses:
        assert server.process.poll() is None and time.monotonic() < end, statuses
        with contextlib.suppress(httpx.TransportError):
            statuses.add(server.post("/tokenize", {"prompt": "x"}).status_code)
        time.sleep(0.02)
    assert statuses == {200, 503}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        short = pool.submit(server.post, "/v1/chat/completions", asked("secret words", max_tokens=200))
        server.until("num_requests_running", 1)
        begun = time.monotonic()
        assert server.stop() == 0 and time.monotonic() - begun < 20
        assert short.result().json()["usage"]["completion_tokens"] == 200
    assert "secret words" not in "".join(server.printed)


def test_what_cannot_start(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    for argv, word in ((["--model", str(tmp_path)], "error: "),
                       (["--model", str(GOLDEN / "glm4"), "--port", "0"], "--port is 0"),
                       (["--model", str(GOLDEN / "glm4"), "--max-model-len", "99999999"], "--max-model-len")):
        done = subprocess.run([sys.executable, "-m", "runtime.serve", "--port", "8765", *argv], cwd=ROOT, capture_output=True,
                              text=True, timeout=120)
        assert done.returncode == 2 and word in done.stderr and "Traceback" not in done.stderr, done.stderr
