"""ASGI middleware before the routes.

Takes every HTTP request; passes on those with the API key, a body within the limits and a free
place; cancels those whose client goes away.
"""

import asyncio
import hmac
from contextlib import contextmanager

from runtime.serve.errors import ApiError, error_response

BODY_SECONDS = 60  # a client that sends its body more slowly is not waited for
STALL_SECONDS = 10  # nor one that sends nothing of it for so long
SMALL_BODY = 1 << 16  # bytes of a body that are always read
BODIES_READ_AT_ONCE = 16  # of the largest size; together they bound the memory of half bodies
OPEN_PATHS = {"/health"}


class Guard:
    """Reads a POST whole, up to `max_body` bytes, before a route sees it, and cancels the route
    when its client goes away.

    A request takes its place when its body is there: who sends slowly keeps nobody out. check()
    raises ApiError while no POST can be served. At most `max_in_flight` are served at once.
    """

    def __init__(self, app, check, max_in_flight: int, max_body: int, api_key: str | None):
        self.app = app
        self._check = check
        self._max_in_flight = max_in_flight
        self._max_body = max_body
        self._key = api_key and api_key.encode()
        self._in_flight = 0
        self._bytes_arriving = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if has_two_lengths(scope):
            send = with_close(send)
        try:
            if scope["path"] not in OPEN_PATHS:
                self._authenticate(dict(scope["headers"]).get(b"authorization", b""))
            if scope["method"] != "POST":
                return await self.app(scope, receive, send)
            self._check()
            self._check_in_flight()
        except ApiError as error:
            return await error_response(error)(scope, receive, send)
        await self._serve(scope, receive, send)

    def _authenticate(self, header: bytes):
        if self._key and not hmac.compare_digest(header, b"Bearer " + self._key):
            raise ApiError(
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                401,
                "invalid_api_key",
            )

    def _check_in_flight(self):
        if self._in_flight >= self._max_in_flight:
            raise ApiError(
                f"{self._max_in_flight} requests are under way, which is the limit; "
                "try again later",
                429,
                "queue_full",
            )

    @contextmanager
    def _count_in_flight(self):
        """Yields leave(), and counts a request until that is called, or else until its end."""
        counted = True
        self._in_flight += 1

        def leave():
            nonlocal counted
            if counted:
                counted = False
                self._in_flight -= 1

        try:
            yield leave
        finally:
            leave()

    async def _serve(self, scope, receive, send):
        try:
            body = await asyncio.wait_for(self._read_body(scope, receive), BODY_SECONDS)
            self._check_in_flight()
        except ApiError as error:
            return await error_response(error)(scope, receive, send)
        except asyncio.TimeoutError:
            late = ApiError(
                f"the body did not arrive within {BODY_SECONDS} seconds, or paused for "
                f"{STALL_SECONDS}",
                408,
            )
            return await error_response(late)(scope, receive, send)
        if body is None:
            return None
        with self._count_in_flight() as leave:
            sending = call_before_end(send, leave)
            await run_while_connected(self.app(scope, ReplayBody(body), sending), receive)

    async def _read_body(self, scope, receive) -> bytes | None:
        """None when the client went away."""
        self._check_size(int(dict(scope["headers"]).get(b"content-length", b"0")))
        body = bytearray()
        more = True
        try:
            while more:
                message = await asyncio.wait_for(receive(), STALL_SECONDS)
                if message["type"] == "http.disconnect":
                    return None
                self._bytes_arriving += len(message.get("body", b""))
                body += message.get("body", b"")
                more = message.get("more_body", False)
                self._check_size(len(body))
                self._check_bytes_arriving(len(body))
        finally:
            self._bytes_arriving -= len(body)
        return bytes(body)

    def _check_bytes_arriving(self, size: int):
        if size > SMALL_BODY and self._bytes_arriving > BODIES_READ_AT_ONCE * self._max_body:
            raise ApiError("too many large bodies are arriving; try again later", 429, "queue_full")

    def _check_size(self, size: int):
        if size > self._max_body:
            raise ApiError(
                f"the body exceeds the limit of {self._max_body:,} bytes", 413, "request_too_large"
            )


def has_two_lengths(scope) -> bool:
    """Content-Length beside Transfer-Encoding: a proxy in front may have taken the other one, so
    nothing more is read from this connection (RFC 9112 6.3)."""
    names = {name for name, _ in scope["headers"]}
    return {b"content-length", b"transfer-encoding"} <= names


def with_close(send):
    """`send` that ends the connection with the response."""

    async def sending(message):
        if message["type"] == "http.response.start":
            others = [pair for pair in message["headers"] if pair[0].lower() != b"connection"]
            message = {**message, "headers": [*others, (b"connection", b"close")]}
        await send(message)

    return sending


def call_before_end(send, leave):
    """`send` that calls leave() before the end of the response goes out, because the client may
    send its next request at once."""

    async def sending(message):
        if message["type"] == "http.response.body" and not message.get("more_body"):
            leave()
        await send(message)

    return sending


class ReplayBody:
    """A `receive` that gives the body once; `run_while_connected` watches the connection's end."""

    def __init__(self, body: bytes):
        self._body = body

    async def __call__(self) -> dict:
        if self._body is None:
            await asyncio.Event().wait()
        body = self._body
        self._body = None
        return {"type": "http.request", "body": body, "more_body": False}


async def run_while_connected(route, receive):
    """Run the coroutine `route` to its end, or cancel it when the client goes away."""
    running = asyncio.ensure_future(route)
    disconnected = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait((running, disconnected), return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            await running
    finally:
        for task in (running, disconnected):
            task.cancel()
        await asyncio.wait((running, disconnected))


async def wait_for_disconnect(receive):
    while (await receive())["type"] != "http.disconnect":
        pass
