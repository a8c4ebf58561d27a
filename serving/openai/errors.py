"""Errors as the OpenAI API writes them: a status, and {"error": {"message", "type", "param", "code"}}.

Everything that can go wrong in a request becomes an `ApiError` here, whichever layer raised it.
"""

from typing import Any

from pydantic import ValidationError

from ..errors import EngineDeadError, EngineDrainingError, InvalidRequestError, QueueFullError, StepFailedError

BAD_REQUEST = "invalid_request_error"
TYPES = {401: "authentication_error", 429: "rate_limit_error"}  # other 4xx: BAD_REQUEST; 5xx: server_error


class ApiError(Exception):
    """What a client is answered with instead of a result.

    param          the request's field that is wrong, as the client spells it, if one is
    code           a word for programs: model_not_found, queue_full, ...
    retry_after_s  when trying again makes sense; becomes the Retry-After header
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, BAD_REQUEST if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        headers = {} if self.retry_after_s is None else {"retry-after": str(self.retry_after_s)}
        return headers | ({"www-authenticate": "Bearer"} if self.status == 401 else {})


def invalid(param: str | None, message: str) -> ApiError:
    return ApiError(400, message, param, "invalid_value")


def api_error(error: Exception) -> ApiError | None:
    """The API's form of an error that was raised on purpose; None for any other, which is a bug here."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InvalidRequestError):
        return invalid(error.field, str(error))
    if isinstance(error, ValidationError):
        return from_pydantic(error)
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), code="queue_full", retry_after_s=1)
    if isinstance(error, EngineDrainingError):
        return ApiError(503, str(error), code="draining", retry_after_s=5)
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), code="engine_dead", retry_after_s=30)
    if isinstance(error, StepFailedError):
        return ApiError(500, str(error), code="step_failed")
    return None


def from_pydantic(error: ValidationError) -> ApiError:
    """The first thing that is wrong with a body, in words; further ones are counted."""
    details = error.errors(include_url=False)
    first = details[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InvalidRequestError):  # raised by one of our own validators
        return invalid(field_path((*first["loc"], cause.field)), str(cause))
    param = field_path(first["loc"])
    if first["type"] == "extra_forbidden":
        message = f"unknown field {param!r}: it is not part of this API; leave it out."
        code = "unknown_field"
    elif first["type"] == "missing":
        message, code = f"field {param!r} is required and missing; add it.", "missing_field"
    else:
        came = repr(first["input"])
        came = came if len(came) <= 80 else came[:77] + "..."
        message, code = f"{param or 'body'}: {first['msg']}, got {came}.", "invalid_value"
    if len(details) > 1:
        message += f" ({len(details) - 1} more like this)"
    return ApiError(400, message, param or None, code)


_UNION_MEMBERS = ("str", "list[str]", "dict[str,any]")


def field_path(parts: tuple[int | str, ...]) -> str:
    """("messages", 0, "role") as messages[0].role; pydantic's names for the members of a union are left out."""
    path = ""
    for part in parts:
        if part in _UNION_MEMBERS:
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
