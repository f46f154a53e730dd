"""Errors of the service as OpenAI's API gives them.

Takes an exception, returns an ApiError or its HTTP response.
"""

from fastapi.exceptions import RequestValidationError
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
# The rest of a body is not read; after an unexpected error uvicorn ends the connection.
CLOSE = {"Connection": "close"}
HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    408: CLOSE,
    413: CLOSE,
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


def as_api_error(error: Exception) -> ApiError:
    """Of the request itself, only the name of the wrong field is repeated."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        return refused_field(error.errors(), error.body)
    if isinstance(error, HTTPException):
        return ApiError(str(error.detail)[:MOST_CHARACTERS], error.status_code)
    if isinstance(error, UserError):
        return ApiError(str(error), 400 if error.exit_code == USER_MISTAKE else 500)
    return ApiError("internal error; the server's log says more", 500)


def refused_field(problems: list[dict], body) -> ApiError:
    """The error about one field, the one that lies deepest. problems: as pydantic reports them for
    `body`; of a union it reports every branch."""
    paths = [path_in(body, each["loc"], each["type"] == "missing") for each in problems]
    path = max(paths, key=len)
    problem = problems[paths.index(path)]
    field = ".".join(map(str, path)) or None
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "missing":
        message = "is missing"
    return ApiError(f"{field or 'the body'}: {message}"[:MOST_CHARACTERS], param=field)


def path_in(body, location: tuple, missing: bool) -> list:
    """The keys and places of `location` that stand in the body; pydantic's names for the branches
    of a union do not. missing: the last is a field that should stand there."""
    path = []
    value = body
    for step in location:
        if has(value, step):
            value = value[step]
            path.append(step)
        elif missing and step is location[-1]:
            path.append(step)
    return path


def has(value, step) -> bool:
    """Whether `step` is a key or a place of a JSON value."""
    if isinstance(value, list):
        return isinstance(step, int) and step < len(value)
    return isinstance(value, dict) and step in value
