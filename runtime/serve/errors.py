"""Errors of the service as OpenAI's API gives them.

Takes an exception, returns an ApiError or its HTTP response.
"""

from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from models.errors import UserError
from runtime.common.errors import USER_MISTAKE

KINDS = {
    401: "authentication_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable_error",
}
RETRY = {"Retry-After": "1"}  # second
# A body that pauses is not waited for; after an unexpected error uvicorn ends the connection. The
# rest of one that is too large is read and dropped: who still sends when a connection ends may lose
# the answer (RFC 9112 9.6).
CLOSE = {"Connection": "close"}
HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    408: CLOSE,
    429: RETRY,
    500: CLOSE,
    503: RETRY,
}
MOST_CHARACTERS = 500  # of a message that another library worded


class ApiError(Exception):
    """A response with another status than 200, in OpenAI's nested form."""

    def __init__(
        self, message: str, status: int = 400, code: str | None = None, param: str | None = None
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    def at(self, place: str) -> "ApiError":
        """The same about the part of the request at `place`."""
        return ApiError(f"{place}: {self}", self.status, self.code, place)

    def body(self) -> dict:
        error = {
            "message": str(self),
            "type": KINDS.get(self.status, "invalid_request_error"),
            "param": self.param,
            "code": self.code or str(self.status),
        }
        return {"error": error}


def error_response(error: ApiError) -> JSONResponse:
    return JSONResponse(error.body(), error.status, headers=HEADERS.get(error.status))


def as_api_error(error: Exception, param: str | None = None) -> ApiError:
    """param: the field that was read when another library or the engine raised `error`."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return ApiError(str(error.detail)[:MOST_CHARACTERS], error.status_code)
    if isinstance(error, UserError):
        status = 400 if error.exit_code == USER_MISTAKE else 500
        return ApiError(str(error), status, param=param)
    return ApiError("internal error; the server's log says more", 500)
