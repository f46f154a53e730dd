"""The service as clients see it: openai-python and httpx; golden checkpoints, greedy answers."""

import base64
import concurrent.futures
import contextlib
import http.client
import io
import json
import signal
import threading
import time

import httpx
import openai
import paths
import pytest
import service
from http_service import Asking, Server, about, asked, data_uri, png
from PIL import Image

from runtime.common.errors import run_command
from runtime.serve.__main__ import main
from runtime.serve.schema import LegacyRequest

ROOT = paths.ROOT
GOLDEN = paths.GOLDEN
PICTURE = GOLDEN / "visualglm" / "image.png"
LENGTH = 900


class Process(service.Process, Asking):
    """The command itself."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "a.png").write_bytes(PICTURE.read_bytes())
    (folder / "out.png").symlink_to(PICTURE)
    running = Server(
        "--model",
        str(GOLDEN / "glm_edge_v"),
        "--max-model-len",
        "1024",
        "--max-num-seqs",
        "4",
        "--served-model-name",
        "edge",
        "--allowed-local-media-path",
        str(folder),
        "--limit-images",
        "2",
        "--max-image-pixels",
        "1000000",
        "--max-image-bytes",
        "200000",
        "--max-body-bytes",
        "1000000",
    )
    running.folder = folder
    yield running
    running.stop()


@pytest.fixture(scope="module")
def narrow():
    """One request at a time, no queue, an API key."""
    running = Server(
        "--model",
        str(GOLDEN / "visualglm"),
        "--max-num-seqs",
        "1",
        "--max-queue",
        "0",
        "--api-key",
        "secret",
    )
    yield running
    running.stop()


KEY = {"Authorization": "Bearer secret"}


def ask(client, messages, stream=False, **more):
    extra = {"repetition_penalty": 1, "ignore_eos": True, **more.pop("extra", {})}
    return client.chat.completions.create(
        model="edge",
        messages=messages,
        temperature=0,
        stream=stream,
        **{"max_tokens": 12, **more},
        extra_body=extra,
    )


@pytest.fixture(scope="module")
def engine():
    from runtime import Engine

    return Engine(
        GOLDEN / "glm_edge_v", vision="torch", dtype="float32", max_model_len=1024, max_num_seqs=1
    )


def expected(engine, messages, tokens=12, **more):
    from runtime import SamplingParams

    fixed = {"max_tokens": tokens, "temperature": 0, "ignore_eos": True, "repetition_penalty": 1.0}
    [result] = engine.generate([engine.prompt(messages)], SamplingParams(**{**fixed, **more}))
    return result


def test_text_equals_the_engine(server, engine):
    messages = [{"role": "user", "content": "你好"}]
    result = expected(engine, messages)
    answer = ask(server.client(), messages)
    assert (
        answer.choices[0].message.content == result.text
        and answer.choices[0].finish_reason == "length"
    )
    assert (
        answer.usage.completion_tokens == 12
        and answer.usage.total_tokens == result.metrics["prompt_tokens"] + 12
    )
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
    chunks = list(
        ask(server.client(), messages, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices == []
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + [
        "length"
    ]
    assert (
        "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
        == whole.choices[0].message.content
    )
    assert chunks[-1].usage.completion_tokens == 12 and len({c.id for c in chunks}) == 1
    raw = server.post("/v1/chat/completions", asked(stream=True))
    assert raw.headers["content-type"].startswith("text/event-stream") and raw.text.endswith(
        "data: [DONE]\n\n"
    )


def test_stop_strings_and_seed(server, engine):
    messages = [{"role": "user", "content": "hello"}]
    text = ask(server.client(), messages).choices[0].message.content
    cut = ask(server.client(), messages, stop=[text[3:5]]).choices[0]
    assert (
        cut.finish_reason == "stop"
        and cut.message.content == expected(engine, messages, stop=(text[3:5],)).text
    )
    assert len(cut.message.content) <= text.index(text[3:5])
    same = [
        server.post("/v1/chat/completions", asked(temperature=1, seed=7)).json()["choices"]
        for _ in range(2)
    ]
    assert same[0] == same[1]


def test_penalties_and_stop_tokens_equal_the_engine(server, engine):
    messages = [{"role": "user", "content": "hello"}]
    plain = expected(engine, messages)
    for more in ({"presence_penalty": 1.5}, {"frequency_penalty": -1.5}, {"frequency_penalty": 2}):
        answer = ask(server.client(), messages, **more).choices[0].message.content
        assert answer == expected(engine, messages, **more).text
    assert len({expected(engine, messages, frequency_penalty=f).text for f in (-1.5, 0, 2)}) > 1, (
        "they change something"
    )
    last = plain.token_ids[5]
    cut = ask(server.client(), messages, extra={"stop_token_ids": [last]})
    assert (
        cut.usage.completion_tokens == plain.token_ids.index(last)
        and cut.choices[0].finish_reason == "stop"
    )
    sampled = [
        server.post("/v1/chat/completions", asked(temperature=3, seed=1, min_p=p)).json()[
            "choices"
        ][0]["message"]
        for p in (1, 0, None)
    ]
    assert sampled[0]["content"] == plain.text and sampled[1] == sampled[2] != sampled[0]


def test_logprobs(server):
    messages = [{"role": "user", "content": "hello"}]
    rows = ask(server.client(), messages, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert len(rows) == 12 and all(len(row.top_logprobs) == 3 for row in rows)
    assert all(
        row.logprob == row.top_logprobs[0].logprob <= 0 for row in rows
    )  # greedy: the likeliest
    chunks = ask(server.client(), messages, stream=True, logprobs=True)
    parts = [c.choices[0].logprobs.content for c in chunks if c.choices[0].logprobs]
    assert [row.logprob for part in parts for row in part] == pytest.approx(
        [row.logprob for row in rows], abs=1e-4
    )


def test_completions_and_tokens(server):
    ids = server.post("/tokenize", {"prompt": "hello world"}).json()
    assert ids["count"] == len(ids["tokens"]) > 0 and ids["max_model_len"] == 1024
    assert server.post("/detokenize", {"tokens": ids["tokens"]}).json()["prompt"] == "hello world"
    client = server.client().completions
    same = {"model": "edge", "temperature": 0, "max_tokens": 5}
    by_text = client.create(prompt="hello world", logprobs=2, **same)
    assert client.create(prompt=ids["tokens"], **same).choices[0].text == by_text.choices[0].text
    assert len(by_text.choices[0].logprobs.tokens) == by_text.usage.completion_tokens
    assert (
        "".join(c.choices[0].text for c in client.create(prompt="hello world", stream=True, **same))
        == by_text.choices[0].text
    )
    messages = server.post("/tokenize", {"messages": asked()["messages"]}).json()
    assert (
        messages["count"]
        == server.post("/v1/chat/completions", asked()).json()["usage"]["prompt_tokens"]
    )


def test_helpers(server):
    client = server.client()
    assert [(m.id, m.max_model_len) for m in client.models.list()] == [("edge", 1024)]
    assert client.models.retrieve("edge").object == "model"
    assert httpx.get(server.url + "/version").json()["version"]
    metrics = httpx.get(server.url + "/metrics").text
    for name in (
        "num_requests_running",
        "generation_tokens_total",
        "time_to_first_token_seconds_count",
        "vision_encode_seconds_count",
        "request_success_total",
    ):
        assert f"ascend_vlm:{name}{{" in metrics


BIG = "word " * 2000
DAMAGED = png(300, 300)[:-40]


@pytest.mark.parametrize(
    ("body", "status", "word"),
    [
        (asked(model="other"), 404, "'other' does not exist"),
        (asked(n=2), 400, "n is not supported"),
        (asked(tools=[{"type": "function"}]), 400, "tools[0].function"),
        (asked(min_p=1.1), 400, "min_p"),
        (asked(presence_penalty=2.5), 400, "presence_penalty"),
        (asked(response_format={"type": "json_object"}), 400, "response"),
        (asked(frequency_penalty="x"), 400, "frequency_penalty"),
        (asked(stop_token_ids=[-5]), 400, "stop_token_ids"),
        (asked(logit_bias={"5": 1}), 400, "logit_bias"),
        (asked(stop_token_ids=[2**70]), 400, "stop_token_ids"),
        (asked(temperature=-1), 400, "temperature"),
        (asked(top_p=0), 400, "top_p"),
        (asked(max_tokens=0), 400, "max_tokens"),
        (asked(max_tokens=2000), 400, "maximum context length"),
        (asked(BIG), 400, "maximum context length"),
        (asked("x" * 500_000), 400, "maximum context length"),
        (asked(stop=[""]), 400, "stop"),
        (asked(seed=2**70), 400, "seed"),
        ({"messages": []}, 400, "messages"),
        ({}, 400, "messages"),
        (asked(max_completion_tokens=0), 400, "max_completion_tokens"),
        ({"messages": [{"role": "judge", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "user"}]}, 400, "content"),
        ({"messages": about("http://127.0.0.1/a.png")}, 400, "fetches no URL"),
        ({"messages": about("/etc/passwd")}, 400, "this server may read"),
        ({"messages": about("file:///etc/passwd")}, 400, "not one that this server may read"),
        ({"messages": about("data:image/png;base64,@@@")}, 422, "base64"),
        ({"messages": about(data_uri(b"GIF"))}, 422, "read"),
        ({"messages": about(data_uri(DAMAGED))}, 422, "damaged"),
        ({"messages": about(data_uri(png(2000, 600)))}, 413, "pixels"),
        ({"messages": about(data_uri(png(9, 9) + b"0" * 200_000))}, 413, "bytes"),
        (asked("x" * 1_000_001), 413, "body exceeds"),
        ({"messages": about(data_uri(png(9, 9))) * 3}, 400, "3 pictures"),
    ],
)
def test_mistakes(body, status, word, server):
    for more in ({}, {"stream": True}):
        got = server.post("/v1/chat/completions", {**body, **more})
        error = got.json()["error"]
        assert got.status_code == status and word in error["message"], error
        assert set(error) == {"message", "type", "param", "code"} and len(error["message"]) < 600
    assert server.gauge("num_requests_running") == server.gauge("num_requests_waiting") == 0


def test_who_sends_too_large_a_body_reads_why_and_may_ask_again(server):
    """Over the same connection, while the rest of the body is still on its way."""
    client = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    client.connect()
    first = client.sock
    for body, status in ((b" " * 8_000_000, 413), (b" " * 2_000_000, 413), (b"{}", 400)):
        client.request(
            "POST", "/v1/chat/completions", body, headers={"Content-Type": "application/json"}
        )
        answer = client.getresponse()
        assert answer.status == status and b"error" in answer.read()
        assert client.sock is first
    client.close()


def test_the_picture_that_cannot_be_read_is_named(server):
    text = {"type": "text", "text": "?"}
    good = {"type": "image_url", "image_url": {"url": data_uri(png(9, 9))}}
    wrong = {"type": "image_url", "image_url": "data:image/png;base64,@@@"}
    answer = {"role": "assistant", "content": "a"}
    messages = [*about(data_uri(png(9, 9))), answer, {"role": "user", "content": [text, wrong]}]
    for body, place in (
        ({"messages": [{"role": "user", "content": [good, wrong]}]}, "messages[0].content[1]"),
        ({"messages": messages}, "messages[2].content[1]"),
    ):
        error = server.post("/v1/chat/completions", body).json()["error"]
        assert error["param"] == f"{place}.image_url.url"
        assert error["message"].startswith(
            f"{place}.image_url.url: the picture is not valid base64"
        )
    error = server.post("/", {"text": "?", "image": "@@@"}).json()["error"]
    assert error["param"] == "image" and error["message"].startswith("image: the picture")


def test_a_visualglm_continues_a_text(narrow):
    """With the special ids that its tokenizer puts behind every text; they have no probabilities."""
    body = {"prompt": "hello", "max_tokens": 3, "echo": True}
    plain = narrow.post("/tokenize", {"prompt": "hello", "add_special_tokens": False}, headers=KEY)
    got = narrow.post("/v1/completions", body, headers=KEY).json()
    assert got["usage"]["prompt_tokens"] == plain.json()["count"] + 2
    assert got["choices"][0]["text"].startswith("hello")
    refused = narrow.post("/v1/completions", {**body, "logprobs": 1}, headers=KEY)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "echo"


def test_files_outside_the_folder(server):
    for url in (
        (server.folder / "out.png").as_uri(),
        f"file://{server.folder}/../x.png",
        f"file://{server.folder}",
        f"file://{server.folder}/%2e%2e/%2e%2e/etc/passwd",
        "file:///%00",
    ):
        got = server.post("/v1/chat/completions", {"messages": about(url)})
        assert got.status_code == 400 and "may read" in got.json()["error"]["message"], url


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"[" * 100_000,
        b'{"messages": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b"\xff\xfe",
        b'{"messages": NaN}',
    ],
)
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize", "/"]
)
def test_hostile_bodies(body, path, server):
    got = server.post(path, content=body, headers={"content-type": "application/json"})
    assert got.status_code == 400 and got.json()["error"]["message"], got.text


def test_infinite_temperature(server):
    body = json.dumps(asked(temperature=float("inf")))
    got = server.post(
        "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert got.status_code == 400 and got.json()["error"]["param"] == "temperature"


@pytest.fixture
def breaking():
    """A service whose engine loads when told to, and whose steps fail in the way told."""
    from runtime import Engine

    load = threading.Event()

    def open_engine():
        load.wait()
        return Engine(GOLDEN / "glm_edge", dtype="float32", max_num_seqs=1)

    running = Server(
        "--model",
        str(GOLDEN / "glm_edge"),
        "--served-model-name",
        "edge",
        open_engine=open_engine,
        wait=False,
    )
    running.load = load
    yield running
    load.set()
    running.stop()


def test_every_status_is_an_exception_of_openai(server, narrow, breaking, monkeypatch):
    messages = asked()["messages"]
    wrong = [
        openai.BadRequestError,
        openai.NotFoundError,
        openai.APIStatusError,
        openai.UnprocessableEntityError,
    ]
    for error, status, more in zip(
        wrong,
        (400, 404, 413, 422),
        (
            {"messages": asked(BIG)["messages"]},
            {"model": "no"},
            {"messages": about(data_uri(png(2000, 600)))},
            {"messages": about(data_uri(DAMAGED))},
        ),
    ):
        with pytest.raises(error) as caught:
            server.client().chat.completions.create(
                **{"model": "edge", "messages": messages, **more}
            )
        assert caught.value.status_code == status and caught.value.body["message"]
    with pytest.raises(openai.AuthenticationError):
        ask(narrow.client(api_key="wrong"), messages)
    with pytest.raises(openai.APIStatusError) as caught:
        ask(breaking.client(), messages)
    assert caught.value.status_code == 503 and caught.value.response.headers["retry-after"]
    breaking.load.set()
    breaking.wait()
    monkeypatch.setattr(breaking.engine, "step", lambda: 1 / 0)
    with pytest.raises(openai.InternalServerError, match="internal error"):
        ask(breaking.client(), messages)
    with pytest.raises(
        openai.APIError, match="internal error"
    ):  # the stream has begun: an event in it
        list(ask(breaking.client(), messages, stream=True))
    monkeypatch.undo()
    assert ask(breaking.client(), messages).usage.completion_tokens == 12, "and it goes on"


def test_two_pictures():
    """LLaVA takes several; each stands where the message has it."""
    from runtime import Engine

    engine = Engine(GOLDEN / "llava", vision="torch", dtype="float32", max_num_seqs=1)
    files = [GOLDEN / "llava" / f"image_{which}.png" for which in "ab"]
    orders = (files, files[::-1])
    question = {"type": "text", "text": "compare"}
    contents = [
        [*({"type": "image", "image": str(file)} for file in order), question] for order in orders
    ]
    alone = [expected(engine, [{"role": "user", "content": content}]).text for content in contents]
    server = Server(
        "--model", str(GOLDEN / "llava"), "--served-model-name", "edge", open_engine=lambda: engine
    )
    try:
        for order, text in zip(orders, alone):
            parts = [
                {"type": "image_url", "image_url": {"url": data_uri(file.read_bytes())}}
                for file in order
            ]
            answer = ask(server.client(), [{"role": "user", "content": [*parts, question]}])
            assert answer.choices[0].message.content == text
    finally:
        server.stop()
    assert alone[0] != alone[1]


def test_cancel_in_mid_stream(server):
    chunks = ask(server.client(), asked()["messages"], stream=True, max_tokens=LENGTH)
    assert [next(chunks) for _ in range(4)][0].choices[0].delta.role == "assistant"
    chunks.close()
    server.until("num_requests_running", 0, seconds=5)


def test_wrong_paths_and_openai_errors(server):
    assert httpx.get(server.url + "/v2").json()["error"]["type"] == "not_found_error"
    assert httpx.get(server.url + "/v1/chat/completions").status_code == 405
    with pytest.raises(openai.BadRequestError) as caught:
        ask(server.client(), asked(BIG)["messages"])
    assert caught.value.code == "context_length_exceeded"


def test_many_at_once_answer_as_alone(server, engine):
    """64 clients, unequal prompts and lengths, some with a picture; four run together, the others wait."""
    cases = [(f"{'你好 world ' * (i % 5)}{i}", 3 + 5 * (i % 6), i % 4 == 0) for i in range(64)]

    def content(i, with_picture, kind):
        file = png(40, 30, (i * 9, 30, 60))
        picture = (
            {"type": "image_url", "image_url": {"url": data_uri(file)}}
            if kind == "url"
            else {"type": "image", "image": Image.open(io.BytesIO(file))}
        )
        return [*([picture] * with_picture), {"type": "text", "text": cases[i][0]}]

    alone = [
        expected(engine, [{"role": "user", "content": content(i, picture, "pil")}], tokens).text
        for i, (_, tokens, picture) in enumerate(cases)
    ]
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        together = pool.map(
            lambda i: (
                ask(
                    server.client(),
                    [{"role": "user", "content": content(i, cases[i][2], "url")}],
                    max_tokens=cases[i][1],
                )
                .choices[0]
                .message.content
            ),
            range(64),
        )
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
    assert (
        server.gauge("kv_cache_usage_perc") == 0
        and server.gauge("request_success_total") == before + 1
    )


def test_key_and_queue(narrow):
    assert narrow.post("/v1/chat/completions", asked()).status_code == 401
    wrong = httpx.get(narrow.url + "/v1/models", headers={"Authorization": "Bearer secre"})
    assert wrong.status_code == 401 and wrong.json()["error"]["code"] == "invalid_api_key"
    url = narrow.url + "/v1/chat/completions"
    with httpx.stream(
        "POST", url, json=asked(max_tokens=1500, stream=True), headers=KEY, timeout=60
    ) as first:
        lines = first.iter_lines()
        assert first.status_code == 200 and next(lines)
        full = narrow.post("/v1/chat/completions", asked(), headers=KEY)
        with pytest.raises(openai.RateLimitError):
            ask(narrow.client(api_key="secret"), asked()["messages"])
        assert (
            full.status_code == 429
            and full.headers["retry-after"]
            and full.json()["error"]["type"] == "rate_limit_error"
        )
    for _ in range(100):
        if narrow.post("/v1/chat/completions", asked(), headers=KEY).status_code == 200:
            return
        time.sleep(0.05)
    pytest.fail("the place was not given back")


def test_legacy_route(narrow):
    image = base64.b64encode(PICTURE.read_bytes()).decode()
    body = {
        "image": image,
        "text": "描述这张图片。",
        "history": [],
        "max_length": 60,
        "temperature": 0,
    }
    first = narrow.post("/", body, headers=KEY).json()
    assert (
        first["status"] == 200
        and first["history"] == [["描述这张图片。", first["result"]]]
        and first["time"]
    )
    more = narrow.post(
        "/", {**body, "text": "and", "history": first["history"], "max_length": 100}, headers=KEY
    ).json()
    assert len(more["history"]) == 2 and more["history"][1] == ["and", more["result"]]
    assert narrow.post("/", {**body, "image": "@"}, headers=KEY).status_code == 422
    for encoded in (base64.encodebytes(PICTURE.read_bytes()).decode(), f"data:;base64,{image}"):
        again = narrow.post("/", {**body, "image": encoded}, headers=KEY).json()
        assert again["result"] == first["result"]


def test_loading_then_graceful_end(request):
    """503 while it loads; SIGTERM lets an answer finish within the time it has."""
    server = Process("--model", str(GOLDEN / "visualglm"), "--shutdown-seconds", "10")
    request.addfinalizer(server.process.kill)
    statuses = set()
    end = time.monotonic() + 60
    while 200 not in statuses:
        assert server.process.poll() is None and time.monotonic() < end, statuses
        with contextlib.suppress(httpx.TransportError):
            statuses.add(server.post("/tokenize", {"prompt": "x"}).status_code)
        time.sleep(0.02)
    assert statuses == {200, 503}
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        short = pool.submit(
            server.post, "/v1/chat/completions", asked("secret words", max_tokens=200)
        )
        server.until("num_requests_running", 1)
        begun = time.monotonic()
        assert server.stop() == 0 and time.monotonic() - begun < 20
        assert short.result().json()["usage"]["completion_tokens"] == 200
    assert "secret words" not in "".join(server.printed)


@pytest.fixture
def signals():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_what_cannot_start(tmp_path, capsys, signals):
    (tmp_path / "config.json").write_text(json.dumps({}))
    for argv, word in (
        (["--model", str(tmp_path)], "error: "),
        (["--model", str(GOLDEN / "glm4"), "--port", "0"], "--port is 0"),
        (["--model", str(GOLDEN / "glm4"), "--max-model-len", "99999999"], "--max-model-len"),
    ):
        assert run_command(main, ["--port", str(service.free_port()), *argv]) == 2
        printed = capsys.readouterr().err
        assert word in printed and "Traceback" not in printed, printed


def test_max_length_counts_the_prompt_and_leaves_at_least_one_token():
    request = LegacyRequest(text="x", max_length=10)
    assert [request.max_new_tokens(prompt_tokens) for prompt_tokens in (4, 10, 12)] == [6, 1, 1]
    assert LegacyRequest(text="x").max_new_tokens(4) is None
