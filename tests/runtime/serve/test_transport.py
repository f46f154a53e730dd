"""Slow, idle, half-closed and too many connections; addresses; origins; names; places of the queue."""

import contextlib
import errno
import json
import re
import socket
import threading
import time

import httpx
import paths
import pytest
import service
from http_service import Server, asked

from runtime.common.errors import ToolkitError, run_command
from runtime.serve.__main__ import main
from runtime.serve.errors import ApiError
from runtime.serve.transport import connection, guard, listen
from runtime.serve.transport.connection import ConnectionLimits, address_of

EDGE = str(paths.GOLDEN / "glm_edge")
ORIGIN = "https://chat.example.com"


@pytest.fixture(scope="module")
def server():
    running = Server(
        *("--model", EDGE, "--max-model-len", "2048", "--max-num-seqs", "1", "--max-queue", "0"),
        *("--served-model-name", "*", "--served-model-name", "a", "--served-model-name", "b"),
        *("--allowed-origins", ORIGIN, "--max-connections-per-address", "40"),
    )
    yield running
    running.stop()


def connect(server) -> socket.socket:
    port = int(server.url.rpartition(":")[2])
    return socket.create_connection(("127.0.0.1", port), timeout=60)


def message(body=None, path="/v1/chat/completions", version="1.1", headers="") -> bytes:
    data = json.dumps(asked() if body is None else body).encode()
    head = f"POST {path} HTTP/{version}\r\nHost: x\r\nContent-Type: application/json\r\n{headers}"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def read_all(client) -> bytes:
    found = b""
    while True:
        piece = client.recv(65536)
        if not piece:
            return found
        found += piece


def read_answer(client) -> bytes:
    """One answer of a connection that stays open: its headers and its body come as they like."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += client.recv(65536)
    head, _, body = found.partition(b"\r\n\r\n")
    length = int(re.search(rb"(?i)content-length: (\d+)", head)[1])
    while len(body) < length:
        body += client.recv(65536)
    return head + b"\r\n\r\n" + body


def seconds_until_closed(client) -> float:
    begun = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        read_all(client)
    return time.monotonic() - begun


@pytest.mark.parametrize("sent", [b"", b"POST / HT", b"GET /health HTTP/1.1\r\nHost: x\r\nA: "])
def test_a_head_that_does_not_arrive_ends_the_connection(sent, server, monkeypatch):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)
    client = connect(server)
    client.sendall(sent)
    assert 0.3 < seconds_until_closed(client) < 3


def test_a_dripping_head_gains_no_time(server, monkeypatch):
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.6)
    client = connect(server)
    client.sendall(b"GET /health HTTP/1.1\r\n")
    begun = time.monotonic()
    with pytest.raises(OSError):
        while time.monotonic() - begun < 5:
            client.sendall(b"A: b\r\n")
            time.sleep(0.1)
    assert time.monotonic() - begun < 3


def test_an_idle_connection_ends_and_a_second_request_has_its_own_time(server, monkeypatch):
    client = connect(server)
    client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    assert client.recv(65536).startswith(b"HTTP/1.1 200")
    monkeypatch.setattr(connection, "HEADER_SECONDS", 0.5)
    client.sendall(b"GET /hea")
    assert 0.3 < seconds_until_closed(client) < 3


def test_a_body_that_pauses_gets_408_and_holds_no_place(server, monkeypatch):
    monkeypatch.setattr(guard, "STALL_SECONDS", 1)
    slow = [connect(server) for _ in range(5)]
    for client in slow:
        client.sendall(message()[:-10])
    time.sleep(0.2)
    assert server.post("/v1/chat/completions", asked()).status_code == 200, "one place, not taken"
    for client in slow:
        assert read_all(client).startswith(b"HTTP/1.1 408")


def test_large_bodies_that_arrive_together_have_a_limit(server, monkeypatch):
    monkeypatch.setattr(guard, "BODIES_READ_AT_ONCE", 0)
    big = server.post("/v1/chat/completions", asked("x" * 100_000))
    assert big.status_code == 429 and "arriving" in big.json()["error"]["message"]
    assert server.post("/v1/chat/completions", asked()).status_code == 200


def test_two_lengths_end_the_connection(server):
    client = connect(server)
    smuggled = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    client.sendall(
        b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
        b'f\r\n{"prompt": "x"}\r\n0\r\n\r\n' + smuggled
    )
    got = read_all(client)
    assert got.count(b"HTTP/1.1 ") == 1 and b"connection: close" in got.lower()


def test_chunks_alone_keep_the_connection(server):
    client = connect(server)
    for _ in range(2):
        client.sendall(
            b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b'Transfer-Encoding: chunked\r\n\r\nf\r\n{"prompt": "x"}\r\n0\r\n\r\n'
        )
        assert read_answer(client).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize("stream", [True, False])
def test_a_half_closed_client_gets_its_answer(version, stream, server):
    client = connect(server)
    body = asked(max_tokens=60, stream=stream)
    client.sendall(message(body, version=version))
    client.shutdown(socket.SHUT_WR)
    got = read_all(client)
    assert b" 200 OK\r\n" in got
    assert got.endswith(
        b"data: [DONE]\n\n\r\n0\r\n\r\n" if version == "1.1" and stream else got[-1:]
    )
    assert (b'"finish_reason":"length"' in got) or (b'"finish_reason": "length"' in got)


@pytest.mark.parametrize("stream", [True, False])
def test_signs_of_life_of_http_1_0_are_part_of_the_response(stream, server, monkeypatch):
    monkeypatch.setattr(connection, "PROBE_SECONDS", 0.001)
    client = connect(server)
    client.sendall(message(asked(max_tokens=300, stream=stream), version="1.0"))
    client.shutdown(socket.SHUT_WR)
    head, _, body = read_all(client).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert body.endswith(b"data: [DONE]\n\n") if stream else json.loads(body)["choices"]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_left_is_told_from_one_that_half_closed(version, server):
    client = connect(server)
    client.sendall(message(asked(max_tokens=2000), version=version))
    server.until("num_requests_running", 1)
    client.close()
    server.until("num_requests_running", 0, seconds=10)


def chunked(size: int, count: int) -> bytes:
    """A request whose body, blanks around one object, comes in chunks of `size` bytes."""
    head = "POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    blanks = (b"%x\r\n" % size + b" " * size + b"\r\n") * count
    end = b'f\r\n{"prompt": "x"}\r\n0\r\n\r\n'
    return head.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + blanks + end


def test_a_body_in_tiny_chunks_is_cut(server):
    """Each chunk costs the event loop as much as a large one: three clients stopped the service."""
    with connect(server) as client, contextlib.suppress(OSError):
        client.sendall(chunked(1, 100_000))
        assert read_all(client) == b""
    for size, count in ((1, 3_000), (200, 20_000)):
        with connect(server) as client:
            client.sendall(chunked(size, count))
            assert read_answer(client).startswith(b"HTTP/1.1 200")


def test_a_half_body_and_an_end_are_no_request(server):
    client = connect(server)
    client.sendall(message()[:-5])
    client.shutdown(socket.SHUT_WR)
    assert read_all(client) == b""


def test_too_many_connections_are_told_and_others_go_on(server):
    held = [connect(server) for _ in range(40)]
    time.sleep(0.3)
    client = connect(server)
    client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    got = read_all(client)
    assert got.startswith(b"HTTP/1.1 429") and b"Retry-After: 1" in got
    error = json.loads(got.partition(b"\r\n\r\n")[2])["error"]
    assert "40 connections of your address" in error["message"]
    for each in held:
        each.close()
    time.sleep(0.3)
    assert httpx.get(server.url + "/health", trust_env=False).status_code == 200


def test_connections_are_counted_per_address_and_in_all():
    limits = ConnectionLimits(in_all=3, per_address=2)
    limits.enter("a")
    limits.enter("a")
    with pytest.raises(ApiError, match="2 connections of your address"):
        limits.enter("a")
    limits.enter("b")
    with pytest.raises(ApiError, match="3 connections are open"):
        limits.enter("c")
    limits.leave("a")
    limits.enter("c")


@pytest.mark.parametrize(
    ("client", "address"),
    [
        (("192.0.2.7", 1), "192.0.2.7"),
        (("::ffff:192.0.2.7", 1), "192.0.2.7"),
        (("2001:db8:1:2:3::4", 1), "2001:db8:1:2::/64"),
        (("2001:db8:1:2:ffff::", 1), "2001:db8:1:2::/64"),
        (None, "local"),
    ],
)
def test_one_client_is_an_address_or_a_network(client, address):
    assert address_of(client) == address


def test_an_unread_answer_is_not_kept(server, monkeypatch):
    """Its client reads nothing: after WRITE_SECONDS the connection ends."""
    ended = threading.Event()
    monkeypatch.setattr(connection, "WRITE_SECONDS", 0.5)
    lost = connection.Connection.connection_lost

    def connection_lost(self, exc):
        lost(self, exc)
        ended.set()

    monkeypatch.setattr(connection.Connection, "connection_lost", connection_lost)
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    client.settimeout(15)
    client.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
    request = b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n"
    with pytest.raises(OSError):
        while True:
            client.sendall(request)
    assert ended.wait(10)


# names and origins


def test_any_name_and_several_names(server):
    listed = httpx.get(server.url + "/v1/models", trust_env=False).json()["data"]
    assert [card["id"] for card in listed] == ["a", "b"]
    for name in ("a", "b", "gpt-4o", "glm-edge-1.5b-chat", None):
        assert server.post("/v1/chat/completions", asked(model=name)).status_code == 200


def test_only_allowed_origins_are_told_so(server):
    for origin, allowed in ((ORIGIN, True), ("https://evil.example", False)):
        headers = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        headers["Access-Control-Request-Headers"] = "content-type, authorization"
        url = server.url + "/v1/chat/completions"
        asked_first = httpx.options(url, headers=headers, trust_env=False)
        answer = server.post("/tokenize", {"prompt": "x"}, headers={"Origin": origin})
        name = "access-control-allow-origin"
        assert (asked_first.status_code == 200) is allowed
        assert (asked_first.headers.get(name) == origin) is allowed
        assert (answer.headers.get(name) == origin) is allowed


def test_pages_of_other_sites_cannot_send_without_asking(server):
    body = json.dumps(asked())
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        got = server.post(
            "/v1/chat/completions", content=body, headers={"content-type": kind, "Origin": "x"}
        )
        assert got.status_code == 400 and "Content-Type" in got.json()["error"]["message"]


def test_the_openapi_document_has_the_bodies(server):
    document = httpx.get(server.url + "/openapi.json", trust_env=False).json()
    schema = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    reference = schema["content"]["application/json"]["schema"]["$ref"]
    assert reference == "#/components/schemas/ChatRequest"
    assert "messages" in document["components"]["schemas"]["ChatRequest"]["properties"]
    assert "Message" in document["components"]["schemas"]


# addresses


@pytest.fixture
def taken():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def test_a_taken_port_is_said_before_anything_is_loaded(taken, capsys, monkeypatch):
    monkeypatch.setattr("runtime.serve.__main__.build", lambda *_: pytest.fail("loading began"))
    assert run_command(main, ["--model", EDGE, "--port", str(taken)]) == 2
    printed = capsys.readouterr()
    assert f"--port {taken}" in printed.err and "ready" not in printed.err + printed.out
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "", "http://x", "a" * 300])
def test_hosts_that_are_not_ours(host, capsys, monkeypatch):
    monkeypatch.setattr("runtime.serve.__main__.build", lambda *_: pytest.fail("loading began"))
    argv = ["--model", EDGE, "--api-key", "k", f"--host={host}"]
    assert run_command(main, [*argv, "--port", str(service.free_port())]) == 2
    assert "--host" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "word"),
    [
        (errno.EACCES, "ports below 1024"),
        (errno.EADDRNOTAVAIL, "no address"),
        (errno.EIO, "listen"),
    ],
)
def test_other_reasons(number, word, monkeypatch):
    def bind(*_):
        raise OSError(number, "reason")

    monkeypatch.setattr(listen, "listen", bind)
    with pytest.raises(ToolkitError, match=word):
        listen.open_listeners("127.0.0.1", 80)


def test_an_address_is_free_again_after_the_check():
    port = service.free_port()
    listen.check_address("localhost", port)
    listeners = listen.open_listeners("localhost", port)
    assert listeners
    listen.close_all(listeners)


def test_urls_of_addresses():
    assert listen.url_of("127.0.0.1", 8) == "http://127.0.0.1:8"
    assert listen.url_of("::1", 8) == listen.url_of("[::1]", 8) == "http://[::1]:8"


@pytest.mark.parametrize(
    ("limits", "wanted", "possible", "raised"),
    [
        ((1024, 1024), 512, 512, None),
        ((1024, 4096), 2000, 2000, 2384),
        ((1024, 1024), 2000, 640, None),
        ((256, 256), 512, 16, None),
        ((256, -1), 512, 512, 896),
    ],
)
def test_as_many_connections_as_files(limits, wanted, possible, raised, monkeypatch):
    found = []
    monkeypatch.setattr(listen.resource, "getrlimit", lambda _: limits)
    monkeypatch.setattr(listen.resource, "setrlimit", lambda _, both: found.append(both[0]))
    assert listen.possible_connections(wanted) == possible
    assert found == ([raised] if raised else [])
