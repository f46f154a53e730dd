"""Fetches image files from hosts that the operator named.

Takes a URL and the allowed hosts, returns bytes. Defends against requests that would reach what
only this machine can reach (SSRF): exact host names, looked up once; public addresses only; the
connection goes to the address that was checked; no redirect is followed; bytes and seconds are
limited.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
from urllib.parse import quote, urlsplit

from .errors import ApiError

PORTS = {"http": 80, "https": 443}
CONNECT_SECONDS = 5  # per address, of which two are tried
FETCH_SECONDS = 15  # for all of it
READ_BYTES = 65536
PATH_CHARACTERS = "/%:@!$&'()*+,;=~"
QUERY_CHARACTERS = "/?%:@!$&'()*+,;=~"
# all other IPv6 is local, multicast, or wraps an IPv4 address (mapped, NAT64)
UNICAST = ipaddress.ip_network("2000::/3")
TRANSLATED = [  # Teredo, 6to4
    ipaddress.ip_network(net) for net in ("2001::/32", "2002::/16", "192.88.99.0/24")
]


def fetch(url: str, domains, limit: int) -> bytes:
    """The file at an http(s) URL, up to limit + 1 bytes.

    domains: "host" (its default port) or "host:port", lower case, IPv6 in brackets. ApiError for
    every other host, for an address that is not public, and for whatever keeps the file from
    arriving.
    """
    scheme, host, port, target = split_url(url)
    name = f"[{host}]" if ":" in host else host
    if f"{name}:{port}" not in domains and not (name in domains and port == PORTS[scheme]):
        raise refusal("its host is none that --allowed-media-domains names")
    addresses = public_addresses(host, port)
    try:
        return download(CheckedConnection(scheme, host, port, addresses[:2]), target, limit)
    except (OSError, http.client.HTTPException):
        raise refusal("it did not arrive") from None


def split_url(url: str) -> tuple[str, str, int, str]:
    """scheme, host, port, path with query."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode().lower()
        port = parts.port or PORTS[parts.scheme]
    except (ValueError, KeyError):  # UnicodeError is a ValueError
        raise refusal("it is not an http or https URL") from None
    if parts.username is not None or parts.password is not None:
        raise refusal("it has a user name")
    target = quote(parts.path or "/", safe=PATH_CHARACTERS)
    if parts.query:
        target += "?" + quote(parts.query, safe=QUERY_CHARACTERS)
    return parts.scheme, host, port, target


def public_addresses(host: str, port: int) -> list[str]:
    """The host's addresses. One that is not public makes all of them suspicious."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise refusal("its host is not known") from None
    addresses = list(dict.fromkeys(entry[4][0] for entry in found))
    if not addresses or not all(map(is_public, addresses)):
        raise refusal("its host has an address that is not public")
    return addresses


def is_public(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    if ip.version == 6 and ip not in UNICAST:
        return False
    if ip.is_multicast or ip.is_reserved or any(ip in net for net in TRANSLATED):
        return False
    return ip.is_global


class CheckedConnection(http.client.HTTPConnection):
    """To one of the checked addresses; the host's name is only for the certificate and the Host
    header."""

    def __init__(self, scheme: str, host: str, port: int, addresses: list[str]):
        super().__init__(host, port, timeout=CONNECT_SECONDS)
        self.default_port = PORTS[scheme]
        self._addresses = addresses
        self.late = False
        self._tls = ssl.create_default_context() if scheme == "https" else None

    def connect(self):
        for address in self._addresses:
            try:
                self.sock = socket.create_connection((address, self.port), self.timeout)
                break
            except OSError:
                if address == self._addresses[-1]:
                    raise
        if self._tls:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)

    def cut(self):
        """End it from another thread."""
        self.late = True
        if self.sock:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)


def download(connection: CheckedConnection, target: str, limit: int) -> bytes:
    """The body, up to limit + 1 bytes. A host that sends slowly, headers included, is cut off after
    FETCH_SECONDS."""
    headers = {
        "Accept": "image/*",
        "Accept-Encoding": "identity",
        "User-Agent": "ascend-vlm",
    }
    timer = threading.Timer(FETCH_SECONDS, connection.cut)
    timer.daemon = True
    timer.start()
    try:
        connection.request("GET", target, headers=headers)
        data = read_body(connection.getresponse(), limit)
        if connection.late:
            raise refusal(f"it did not arrive within {FETCH_SECONDS} seconds")
        return data
    finally:
        timer.cancel()
        connection.close()


def read_body(response, limit: int) -> bytes:
    if response.status != 200:
        raise refusal(f"its host answered {response.status}, and redirects are not followed")
    data = bytearray()
    length = response.length
    while len(data) <= limit and (part := response.read1(READ_BYTES)):
        data += part
    if length is not None and len(data) < min(length, limit + 1):
        raise refusal("it did not arrive whole")
    return bytes(data[: limit + 1])


def refusal(why: str) -> ApiError:
    return ApiError(f"the picture's URL cannot be used: {why}", 400, "invalid_image_url")
