"""One client's connection: uvicorn's HTTP/1.1 with time limits, counted per address and in all.

Takes bytes of a socket; closes it when a request's head does not arrive, when a client does not
read its answer, or when there are too many. A client that has sent its request and closes only its
sending side gets its answer.
"""

import asyncio
import ipaddress
import json
from collections import Counter
from dataclasses import dataclass, field

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.serve.errors import ApiError

HEADER_SECONDS = 10  # from a connection's beginning, or a later request's first byte, to its head
KEEP_ALIVE_SECONDS = 20  # between two requests
WRITE_SECONDS = 60  # that a client may leave its answer unread
# Until the first sign of life that tells a half-closed client from one that left; every later one
# takes twice as long, up to the longest.
PROBE_SECONDS = 0.25
LONGEST_PROBE_SECONDS = 4
STATUS_LINE = b"HTTP/1.1 "  # what every response begins with
SLICE_BYTES = 1 << 15  # of what arrives, that are read before the chunks are counted again
MANY_LINES = 10_000  # of a chunked body, beyond those of
SHORTEST_LINE = 64  # bytes on the average
REFUSAL_SECONDS = 1  # that a connection too many may take to read why
MAX_REFUSALS = 64  # connections that are told at once; others are only closed


@dataclass
class ConnectionLimits:
    """Counts the connections. in_all, per_address: how many there may be."""

    in_all: int
    per_address: int
    _open: Counter = field(default_factory=Counter)

    def enter(self, address: str):
        """Count one more; ApiError, and nothing is counted, when there are too many."""
        if self._open.total() >= self.in_all:
            raise too_many(f"{self.in_all} connections are open")
        if self._open[address] >= self.per_address:
            raise too_many(f"{self.per_address} connections of your address are open")
        self._open[address] += 1

    def leave(self, address: str):
        self._open[address] -= 1
        if not self._open[address]:
            del self._open[address]


def too_many(what: str) -> ApiError:
    message = f"{what}, which is the limit; close some, or try again later"
    return ApiError(message, 429, "too_many_connections")


def address_of(client) -> str:
    """What counts as one client: an IPv4 address, or the /64 network of an IPv6 one."""
    if not client:
        return "local"
    try:
        address = ipaddress.ip_address(client[0].partition("%")[0])
    except ValueError:
        return client[0]
    if address.version == 4:
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.ip_network((address, 64), strict=False))


def refusal(error: ApiError) -> bytes:
    """The whole response to a connection whose request is not read."""
    body = json.dumps(error.body()).encode()
    head = (
        f"HTTP/1.1 {error.status} Too Many Requests\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: 1\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body


class BegunResponse:
    """The transport of a response whose first bytes went ahead: HTTP/1.0 knows no interim response,
    but every status line begins alike."""

    def __init__(self, transport: asyncio.Transport):
        self._transport = transport
        self._sent = 0

    def send_ahead(self) -> bool:
        """One byte more; False when what comes next depends on the response."""
        byte = STATUS_LINE[self._sent : self._sent + 1]
        self._transport.write(byte)
        self._sent += len(byte)
        return bool(byte)

    def write(self, data: bytes):
        self._transport.write(data[self._sent :])
        self._sent = 0

    def close(self):
        self._transport.close()


class Connection(H11Protocol):
    """limits: shared by all connections of a server; see `connection_class`."""

    limits: ConnectionLimits
    refusals = 0

    def connection_made(self, transport: asyncio.Transport):
        super().connection_made(transport)
        self._header_timer = None
        self._write_timer = None
        self._probe_timer = None
        self._bytes_received = 0  # of the request that arrives
        self._lines_received = 0
        self._refused = False
        self._address = address_of(self.client)
        try:
            self.limits.enter(self._address)
        except ApiError as error:
            return self._refuse(error)
        self._watch_header()

    def connection_lost(self, exc):
        for timer in (self._header_timer, self._write_timer, self._probe_timer):
            if timer:
                timer.cancel()
        if self._refused:
            type(self).refusals -= 1
        else:
            self.limits.leave(self._address)
        super().connection_lost(exc)

    def data_received(self, data: bytes):
        for start in range(0, len(data), SLICE_BYTES):
            if self._has_tiny_chunks(data[start : start + SLICE_BYTES]):
                return self.transport.abort()
            super().data_received(data[start : start + SLICE_BYTES])
        self._watch_header()

    def _has_tiny_chunks(self, data: bytes) -> bool:
        """Whether a chunked body comes in so many chunks that reading it would keep the event loop
        from everybody else. Every chunk ends two lines."""
        self._bytes_received += len(data)
        self._lines_received += data.count(b"\r\n")
        many = self._lines_received > MANY_LINES + self._bytes_received // SHORTEST_LINE
        return many and any(name == b"transfer-encoding" for name, _ in self.headers or ())

    def eof_received(self) -> bool:
        """True, which keeps the sending side open, while an answer is owed."""
        if not self._is_answering or self.cycle.more_body:
            return False
        self.cycle.keep_alive = False
        if self.scope["http_version"] == "1.0" and not self.cycle.response_started:
            self.cycle.transport = BegunResponse(self.transport)
        self._probe_later(PROBE_SECONDS)
        return True

    def pause_writing(self):
        super().pause_writing()
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self):
        super().resume_writing()
        if self._write_timer:
            self._write_timer.cancel()
            self._write_timer = None

    def on_response_complete(self):
        self._bytes_received = 0
        self._lines_received = 0
        super().on_response_complete()
        if self.transport.is_closing() and not self._write_timer:
            self._write_timer = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch_header(self):
        """A timer runs while a request's head is awaited, however slowly it arrives."""
        if self._is_answering or self.transport.is_closing():
            if self._header_timer:
                self._header_timer.cancel()
                self._header_timer = None
        elif not self._header_timer:
            self._header_timer = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _refuse(self, error: ApiError):
        """Say why, and leave the client a moment to read it; what it sends is not read."""
        self._refused = True
        type(self).refusals += 1
        if self.refusals > MAX_REFUSALS:
            return self.transport.abort()
        self.transport.pause_reading()
        self.transport.write(refusal(error))
        self.transport.write_eof()
        self._write_timer = self.loop.call_later(REFUSAL_SECONDS, self.transport.abort)

    def _probe_later(self, seconds: float):
        self._probe_timer = self.loop.call_later(seconds, self._probe, seconds)

    def _probe(self, waited: float):
        """Only a client that is still there takes a sign of life: an interim response (RFC 9110
        15.2), in HTTP/1.0 a byte of the status line. After one that left, the next write fails,
        which ends the connection and cancels its answer."""
        if self.transport.is_closing() or not self._is_answering or self.cycle.response_started:
            return
        if isinstance(self.cycle.transport, BegunResponse):
            if self.cycle.transport.send_ahead():
                self._probe_later(2 * waited)  # there are few bytes, and an answer may take minutes
            return
        interim = h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue")
        self.transport.write(self.conn.send(interim))
        self._probe_later(min(2 * waited, LONGEST_PROBE_SECONDS))


def connection_class(limits: ConnectionLimits) -> type[Connection]:
    """The protocol of one server."""
    return type("LimitedConnection", (Connection,), {"limits": limits})
