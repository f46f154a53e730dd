"""What stands before the routes: API key, body limits, the bound on requests under way, and clients that go away."""

import asyncio
import hmac
from contextlib import contextmanager

from starlette.responses import JSONResponse

from .errors import ApiError

BODY_SECONDS = 60  # a client that sends its body more slowly is not waited for
RETRY = {"Retry-After": "1"}  # second, for clients that found the queue full
CLOSE = {
    "Connection": "close"
}  # the rest of a body is not read; after an unexpected error uvicorn ends the connection
HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    408: CLOSE,
    413: CLOSE,
    429: RETRY,
    500: CLOSE,
    503: RETRY,
}
OPEN_PATHS = {"/health"}


class Guard:
    """ASGI middleware. A POST is read whole, up to `max_body` bytes, before a route sees it; when its client goes away
    the route is cancelled. check() raises ApiError while no POST can be served; at most `most` are under way."""

    def __init__(self, app, check, most: int, max_body: int, api_key: str | None):
        self.app = app
        self._check = check
        self._most = most
        self._max_body = max_body
        self._key = api_key and api_key.encode()
        self._under_way = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        try:
            if scope["path"] not in OPEN_PATHS:
                self._authenticate(dict(scope["headers"]).get(b"authorization", b""))
            if scope["method"] != "POST":
                return await self.app(scope, receive, send)
            self._check()
            self._admit()
        except ApiError as error:
            return await as_response(error)(scope, receive, send)
        with self._place() as leave:
            await self._serve(scope, receive, before_last(send, leave))

    @contextmanager
    def _place(self):
        """Counts a request as under way until the function it gives is called, at the latest until its end."""
        held = [None]
        self._under_way += 1

        def leave():
            if held:
                held.pop()
                self._under_way -= 1

        try:
            yield leave
        finally:
            leave()

    def _authenticate(self, header: bytes):
        if self._key and not hmac.compare_digest(header, b"Bearer " + self._key):
            raise ApiError(
                "the API key is missing or wrong; send it as Authorization: Bearer KEY",
                401,
                "invalid_api_key",
            )

    def _admit(self):
        if self._under_way >= self._most:
            raise ApiError(
                f"{self._most} requests are under way, which is the limit; try again later",
                429,
                "queue_full",
            )

    async def _serve(self, scope, receive, send):
        try:
            body = await asyncio.wait_for(self._body(scope, receive), BODY_SECONDS)
        except ApiError as error:
            return await as_response(error)(scope, receive, send)
        except asyncio.TimeoutError:
            late = ApiError(f"the body did not arrive within {BODY_SECONDS} seconds", 408)
            return await as_response(late)(scope, receive, send)
        if body is not None:
            await _while_connected(self.app(scope, Replay(body), send), receive)

    async def _body(self, scope, receive) -> bytes | None:
        """None when the client went away."""
        parts = []
        size = 0
        more = True
        self._check_size(int(dict(scope["headers"]).get(b"content-length", b"0")))
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size = size + len(parts[-1])
            more = message.get("more_body", False)
            self._check_size(size)
        return b"".join(parts)

    def _check_size(self, size: int):
        if size > self._max_body:
            raise ApiError(
                f"the body exceeds the limit of {self._max_body:,} bytes", 413, "request_too_large"
            )


def before_last(send, leave):
    """`send` that calls leave() before the end of the answer goes out, because the client may ask again at once."""

    async def sending(message):
        if message["type"] == "http.response.body" and not message.get("more_body"):
            leave()
        await send(message)

    return sending


class Replay:
    """A `receive` that gives the body once; the end of the connection is watched elsewhere."""

    def __init__(self, body: bytes):
        self._body = body

    async def __call__(self) -> dict:
        if self._body is None:
            await asyncio.Event().wait()
        body = self._body
        self._body = None
        return {"type": "http.request", "body": body, "more_body": False}


async def _while_connected(work, receive):
    """Run the coroutine `work` to its end, or cancel it when the client goes away."""
    route = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((route, gone), return_when=asyncio.FIRST_COMPLETED)
        if route.done():
            await route
    finally:
        for task in (route, gone):
            task.cancel()
        await asyncio.wait((route, gone))


async def _disconnect(receive):
    while (await receive())["type"] != "http.disconnect":
        pass


def as_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=HEADERS.get(error.status))
