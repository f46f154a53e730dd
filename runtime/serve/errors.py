"""Errors as the OpenAI API gives them."""

from fastapi.exceptions import RequestValidationError
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


class ApiError(Exception):
    """An answer other than 200, in OpenAI's nested form."""

    def __init__(
        self, message: str, status: int = 400, code: str | None = None, param: str | None = None
    ):
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param

    def body(self) -> dict:
        kind = KINDS.get(self.status, "invalid_request_error")
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param,
                "code": self.code or str(self.status),
            }
        }


def as_api_error(error: Exception) -> ApiError:
    """Nothing of a request is repeated but the name of the field that is wrong."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"][1:])) or None
        return ApiError(f"{field or 'body'}: {first['msg']}"[:500], param=field)
    if isinstance(error, HTTPException):
        return ApiError(str(error.detail)[:500], error.status_code)
    if isinstance(error, UserError):
        return ApiError(str(error), 400 if error.exit_code == USER_MISTAKE else 500)
    return ApiError("internal error; the server's log says more", 500)
