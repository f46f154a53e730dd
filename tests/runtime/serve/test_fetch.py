"""Pictures from named hosts: which addresses and URLs are refused, and how a host that is allowed is read.

All traffic stays on loopback. Where a fetch has to succeed, the test says that loopback is public; nothing else does.
"""

import http.server
import socket
import threading
import time

import pytest
from http_service import png

from runtime.common.errors import ToolkitError
from runtime.serve import fetch
from runtime.serve.errors import ApiError
from runtime.serve.images import ImageRules
from runtime.serve.options import ServeOptions

PICTURE = png(30, 20)


class Host(http.server.ThreadingHTTPServer):
    """Answers by path; remembers what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked = []
        self.port = self.server_address[1]
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *event):  # a client that hangs up is what some tests want
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"]))
        getattr(self, self.path[1:].split("?")[0].split(".")[0], self.missing)()

    def log_message(self, *line):
        pass

    def send(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def missing(self):
        self.send(404)

    def picture(self):
        self.send(200, PICTURE)

    def moved(self):
        self.send(302, Location=f"http://127.0.0.1:{self.server.port}/picture")

    def text(self):
        self.send(200, b"secret")

    def zipped(self):
        self.send(200, b"\x1f\x8b" + bytes(50), Content_Encoding="gzip")

    def cut(self):
        self.send(200, PICTURE[:50], Content_Length=len(PICTURE))

    def endless(self):
        self.send_response(200)
        self.end_headers()
        for _ in range(2000):
            self.wfile.write(bytes(10_000))

    def drip(self):
        self.wfile.write(b"HTTP/1.1 200 OK\r\n")
        for i in range(100):
            self.wfile.write(f"X-{i}: y\r\n".encode())
            time.sleep(0.05)


@pytest.fixture(scope="module")
def host():
    with Host() as running:
        yield running
        running.shutdown()


@pytest.fixture
def loopback_is_public(monkeypatch):
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")


def rules(*domains):
    return ImageRules(4, 200_000, 1_000_000, None, domains)


def refusal(url, *domains):
    with pytest.raises(ApiError) as error:
        rules(*domains).from_url(url)
    assert error.value.status in (400, 413, 422)
    return str(error.value)


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "127.9.9.9",
        "0.0.0.0",
        "10.0.0.1",
        "172.16.0.1",
        "172.31.255.255",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "192.0.0.1",
        "192.0.2.1",
        "198.18.0.1",
        "198.51.100.7",
        "203.0.113.1",
        "192.88.99.1",
        "224.0.0.1",
        "239.255.255.250",
        "240.0.0.1",
        "255.255.255.255",
        "::",
        "::1",
        "fe80::1",
        "fe80::1%lo",
        "fc00::1",
        "fd00:ec2::254",
        "ff02::1",
        "::ffff:8.8.8.8",
        "::ffff:127.0.0.1",
        "::127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b:1::a00:1",
        "2001::1",
        "2002:7f00:1::",
        "2001:db8::1",
        "100::1",
        "fec0::1",
        "4000::1",
        "",
        "localhost",
    ],
)
def test_addresses_that_are_refused(address):
    assert not fetch.is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "172.32.0.1", "2606:4700:4700::1111", "2a00:1450:4001::200e"]
)
def test_addresses_of_the_internet(address):
    assert fetch.is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:{port}/picture",
        "http://localhost:{port}/picture",
        "http://LOCALHOST:{port}/picture",
        "http://[::ffff:127.0.0.1]:{port}/picture",
    ],
)
def test_a_named_host_with_a_private_address_is_not_reached(url, host):
    before = len(host.asked)
    domains = [f"{name}:{host.port}" for name in ("127.0.0.1", "localhost", "[::ffff:127.0.0.1]")]
    assert "not public" in refusal(url.format(port=host.port), *domains)
    assert len(host.asked) == before


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.2:{port}/picture",
        "http://127.1:{port}/",
        "http://2130706433:{port}/",
        "http://0x7f.1:{port}/",
        "http://127.0.0.1/picture",
        "https://127.0.0.1:{other}/",
        "http://127.0.0.1.:{port}/",
        "http://x.127.0.0.1:{port}/",
        "http://127.0.0.1:{port}@localhost/",
        "http://a:b@127.0.0.1:{port}/picture",
        "http://127.0.0.1%2f:{port}/",
        "http://127.0.0.1\\@localhost:{port}/",
        "http://１２７.0.0.2:{port}/",
        "http:///picture",
        "http://",
        "http://[::1",
        "http://127.0.0.1:99999999/",
        "http://" + "a" * 70 + ".de/",
        "https://%00:{port}/",
        "http://ⓛocalhost.x/",
    ],
)
def test_what_is_not_just_a_named_host(url, host, loopback_is_public):
    before = len(host.asked)
    refusal(url.format(port=host.port, other=host.port + 1), f"127.0.0.1:{host.port}")
    assert len(host.asked) == before


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://127.0.0.1/a.png", "begins with ftp:"),
        ("gopher://127.0.0.1:70/_x", "begins with gopher:"),
        ("HTTP://127.0.0.1/", "address that is not public"),
        ("//127.0.0.1/", "this server may read"),
        ("data:text/html;base64,QUJD", "not a picture"),
        ("javascript:1", "begins with javascript:"),
        ("/picture", "this server may read"),
        ("", "is empty"),
    ],
)
def test_other_schemes(url, words):
    assert words in refusal(url, "127.0.0.1")


def test_without_domains_nothing_is_fetched(host):
    before = len(host.asked)
    assert "fetches no URL" in refusal(f"http://127.0.0.1:{host.port}/picture")
    assert len(host.asked) == before


def test_a_picture_comes(host, loopback_is_public):
    allowed = rules(f"127.0.0.1:{host.port}", f"localhost:{host.port}")
    assert allowed.from_url(f"http://127.0.0.1:{host.port}/picture?a=1&b=ü c#top").size == (30, 20)
    assert host.asked[-1] == ("/picture?a=1&b=%C3%BC%20c", f"127.0.0.1:{host.port}")


@pytest.mark.parametrize(
    ("path", "word"),
    [
        ("moved", "302, and redirects are not followed"),
        ("nothing", "answered 404"),
        ("text", "not a picture that can be read"),
        ("zipped", "not a picture that can be read"),
        ("cut", "not arrive whole"),
        ("endless", "has 200,001 bytes, the limit is 200,000"),
    ],
)
def test_what_a_host_may_not_answer(path, word, host, loopback_is_public):
    assert word in refusal(f"http://127.0.0.1:{host.port}/{path}", f"127.0.0.1:{host.port}")
    assert host.asked[-1][0] == f"/{path}"


def test_a_slow_host_is_cut_off(host, loopback_is_public, monkeypatch):
    monkeypatch.setattr(fetch, "FETCH_SECONDS", 0.3)
    begun = time.monotonic()
    assert "did not arrive" in refusal(
        f"http://127.0.0.1:{host.port}/drip", f"127.0.0.1:{host.port}"
    )
    assert time.monotonic() - begun < 2


def test_https_wants_a_certificate(host, loopback_is_public):
    assert "did not arrive" in refusal(
        f"https://127.0.0.1:{host.port}/picture", f"127.0.0.1:{host.port}"
    )


def test_the_name_is_looked_up_once(host, monkeypatch):
    """A name server that first says "public" and then "loopback" gets the first answer connected to, here a closed port."""
    answers = iter([["127.0.0.5"], ["127.0.0.1"]])
    looked_up = []

    def getaddrinfo(name, port, *rest, real=socket.getaddrinfo, **more):
        if name != "rebind.example":
            return real(name, port, *rest, **more)
        looked_up.append(name)
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))
            for address in next(answers)
        ]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.5")
    before = len(host.asked)
    refusal(f"http://rebind.example:{host.port}/picture", f"rebind.example:{host.port}")
    assert looked_up == ["rebind.example"] and len(host.asked) == before


def test_one_private_address_among_public_ones_is_enough(monkeypatch):
    monkeypatch.setattr(
        socket,
        "getaddrinfo",
        lambda *_, **__: [(2, 1, 6, "", (a, 80)) for a in ("8.8.8.8", "10.0.0.1")],
    )
    assert "not public" in refusal("http://mixed.example/a.png", "mixed.example")


@pytest.mark.parametrize("wrong", ["https://a.com", "a.com/x", "a b", "", "a.com:port", "*"])
def test_a_domain_is_a_host(wrong, tmp_path):
    with pytest.raises(
        ToolkitError, match="--allowed-media-domains is .*: give host names without http://"
    ):
        ServeOptions(model=str(tmp_path), allowed_media_domains=[wrong])
    assert ServeOptions(
        model=str(tmp_path), allowed_media_domains=["A.com", "[::1]:80"]
    ).allowed_media_domains == ("a.com", "[::1]:80")
