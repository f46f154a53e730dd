"""Pictures from the network, where the operator named the hosts: looked up once, checked, and fetched from just there.

Defence against requests that would reach what only this machine can (SSRF): exact host names, public addresses only, the
connection goes to the address that was checked, no redirect is followed, and bytes and seconds are limited.
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
CONNECT_SECONDS, FETCH_SECONDS = 5, 15  # per address, of which two are tried; for all of it
UNICAST = ipaddress.ip_network(
    "2000::/3"
)  # all other IPv6 is local, multicast, or wraps an IPv4 address (mapped, NAT64)
TRANSLATED = [
    ipaddress.ip_network(net) for net in ("2001::/32", "2002::/16", "192.88.99.0/24")
]  # Teredo, 6to4


def fetch(url: str, domains, limit: int) -> bytes:
    """The file at an http(s) URL, up to limit + 1 bytes. domains: "host" (its default port) or "host:port", lower case,
    IPv6 in brackets.

    ApiError for every other host, for an address that is not public, and for whatever keeps the file from arriving.
    """
    scheme, host, port, target = taken_apart(url)
    name = f"[{host}]" if ":" in host else host
    if f"{name}:{port}" not in domains and not (name in domains and port == PORTS[scheme]):
        raise refused("its host is none that --allowed-media-domains names")
    addresses = public_addresses(host, port)
    try:
        return download(Connection(scheme, host, port, addresses[:2]), target, limit)
    except (OSError, http.client.HTTPException):
        raise refused("it did not arrive") from None


def taken_apart(url: str) -> tuple[str, str, int, str]:
    """scheme, host, port, path with query."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode().lower()
        port = parts.port or PORTS[parts.scheme]
    except (ValueError, KeyError):  # UnicodeError is a ValueError
        raise refused("it is not an http or https URL") from None
    if parts.username is not None or parts.password is not None:
        raise refused("it has a user name")
    target = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~") + "?" * bool(parts.query)
    return parts.scheme, host, port, target + quote(parts.query, safe="/?%:@!$&'()*+,;=~")


def public_addresses(host: str, port: int) -> list[str]:
    """The host's addresses. One that is not public makes all of them suspicious."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise refused("its host is not known") from None
    addresses = list(dict.fromkeys(entry[4][0] for entry in found))
    if not addresses or not all(map(is_public, addresses)):
        raise refused("its host has an address that is not public")
    return addresses


def is_public(address: str) -> bool:
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return False
    known = ip.version == 4 or ip in UNICAST
    return (
        known
        and ip.is_global
        and not (ip.is_multicast or ip.is_reserved or any(ip in net for net in TRANSLATED))
    )


class Connection(http.client.HTTPConnection):
    """To one of the checked addresses; the host's name is only for the certificate and the Host header."""

    def __init__(self, scheme: str, host: str, port: int, addresses: list[str]):
        super().__init__(host, port, timeout=CONNECT_SECONDS)
        self.default_port = PORTS[scheme]
        self._addresses = addresses
        self.late = False
        self._tls = ssl.create_default_context() if scheme == "https" else None

    def connect(self):
        for i, address in enumerate(self._addresses):
            try:
                self.sock = socket.create_connection((address, self.port), self.timeout)
                break
            except OSError:
                if i + 1 == len(self._addresses):
                    raise
        if self._tls:
            self.sock = self._tls.wrap_socket(self.sock, server_hostname=self.host)

    def cut(self):
        self.late = True
        if self.sock:
            with contextlib.suppress(OSError):
                self.sock.shutdown(socket.SHUT_RDWR)


def download(connection: Connection, target: str, limit: int) -> bytes:
    """A host that sends slowly, headers included, is cut off after FETCH_SECONDS."""
    timer = threading.Timer(FETCH_SECONDS, connection.cut)
    timer.daemon = True
    timer.start()
    try:
        connection.request(
            "GET",
            target,
            headers={
                "Accept": "image/*",
                "Accept-Encoding": "identity",
                "User-Agent": "ascend-vlm",
            },
        )
        data = body(connection.getresponse(), limit)
        if connection.late:
            raise refused(f"it did not arrive within {FETCH_SECONDS} seconds")
        return data
    finally:
        timer.cancel()
        connection.close()


def body(response, limit: int) -> bytes:
    if response.status != 200:
        raise refused(f"its host answered {response.status}, and redirects are not followed")
    data = bytearray()
    whole = response.length
    while len(data) <= limit and (part := response.read1(65536)):
        data += part
    if whole is not None and len(data) < min(whole, limit + 1):
        raise refused("it did not arrive whole")
    return bytes(data[: limit + 1])


def refused(why: str) -> ApiError:
    return ApiError(
        f"the picture's URL cannot be used: {why}", 400, "invalid_image_url", "messages"
    )
