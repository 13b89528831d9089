"""What goes wrong, as each API says it: a status and a body, or an event amid a stream."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from offload.daemon import errors
from offload.errors import (
    CapacityError,
    ClosedError,
    ConfigError,
    DiskFull,
    OffloadError,
    StorageError,
    TransferError,
)

_log = logging.getLogger(__name__)

RETRY_AFTER_S: Final = 2
_NO_RETRY: Final = {"x-should-retry": "false"}
_SOON: Final = {"Retry-After": str(RETRY_AFTER_S)}

ANTHROPIC_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
}


class Unauthorised(OffloadError):
    """A request shows no key, or none that is known."""


class NotFound(OffloadError, LookupError):
    """The tenant has no stored response, conversation or item of that name."""


@dataclass(frozen=True, slots=True)
class Problem:
    """An error as every dialect can tell it.

    Attributes
    ----------
    status : int
    type, code : str or None
        ``error.type`` and ``error.code``.
    message : str
    param : str or None
        The field of the request that is wrong.
    headers : mapping of str to str
    extra : mapping
        Further members of ``error``.
    """

    status: int
    type: str
    code: str | None
    message: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    def openai(self) -> dict[str, Any]:
        """Return the body of OpenAI's API and of llama.cpp's."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error | dict(self.extra)}

    def anthropic(self, request_id: str) -> dict[str, Any]:
        """Return the body of Anthropic's API."""
        kind = ANTHROPIC_TYPES.get(self.status, "invalid_request_error")
        error = {"type": kind, "message": self.message}
        return {"type": "error", "error": error, "request_id": request_id}


# What is not listed is our own fault. The first class that fits counts.
_PLAIN: Final[tuple[tuple[type[Exception], int, str, str | None, Mapping[str, str]], ...]] = (
    (Unauthorised, 401, "authentication_error", "invalid_api_key", {"WWW-Authenticate": "Bearer"}),
    (errors.ModelNotFound, 404, "invalid_request_error", "model_not_found", {}),
    (errors.UnknownSession, 404, "invalid_request_error", "session_not_found", {}),
    (NotFound, 404, "invalid_request_error", "not_found", {}),
    (errors.Incompatible, 409, "conflict_error", "kv_incompatible", _NO_RETRY),
    (errors.QuotaExceeded, 429, "insufficient_quota", "insufficient_quota", _NO_RETRY),
    (errors.Draining, 503, "unavailable_error", "unavailable", _SOON),
    (ClosedError, 503, "unavailable_error", "unavailable", _SOON),
    (CapacityError, 503, "unavailable_error", "no_capacity", _SOON),
    (ConfigError, 400, "invalid_request_error", "invalid_request", {}),
)


def problem_of(error: Exception) -> Problem:
    """Return what a client is told of an exception; what nobody expected is logged."""
    match error:
        case errors.ContextTooLong():
            numbers = {
                "n_prompt_tokens": error.num_prompt_tokens,
                "n_ctx": error.num_context_tokens,
            }
            kind, code = "exceed_context_size_error", "context_length_exceeded"
            return Problem(400, kind, code, str(error), extra=numbers)
        case errors.BadRequest():
            kind, code = "invalid_request_error", "invalid_request"
            return Problem(400, kind, code, str(error), error.param)
        case errors.QueueFull():
            wait = {"Retry-After": str(max(1, round(error.retry_after_s)))}
            kind = "rate_limit_exceeded"
            return Problem(429, kind, kind, str(error), headers=wait)
        case errors.SessionBusy():
            wait = {"Retry-After": str(max(1, math.ceil(error.retry_after_s)))}
            return Problem(409, "conflict_error", "session_busy", str(error), headers=wait)
        case RequestValidationError():
            return _invalid_fields(error)
        case HTTPException():
            return _plain_status(error)
    for kind_of_error, status, kind, plain_code, headers in _PLAIN:
        if isinstance(error, kind_of_error):
            return Problem(status, kind, plain_code, str(error), headers=headers)
    if isinstance(error, (StorageError, TransferError)):
        return _storage_failed(error)
    _log.error("a request failed: %s", error, exc_info=error)
    return Problem(500, "server_error", "internal_error", "internal error; the log has the details")


def _storage_failed(error: Exception) -> Problem:
    """Say that the disk refuses, but not where on the server: its messages name paths."""
    _log.warning("storage: %s", error)
    what = "is full" if isinstance(error, DiskFull) else "failed"
    headers = _NO_RETRY if isinstance(error, DiskFull) else _SOON
    message = f"the server's storage {what}; its log has the details"
    return Problem(503, "server_error", "storage_unavailable", message, headers=headers)


def _invalid_fields(error: RequestValidationError) -> Problem:
    found = error.errors()[0]
    where = [str(part) for part in found["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(where)[:200] or None
    message = f"{param or 'body'}: {found['msg']}"
    return Problem(400, "invalid_request_error", "invalid_request", message, param)


def _plain_status(error: HTTPException) -> Problem:
    codes = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}
    code = codes.get(error.status_code, "invalid_request")
    headers = dict(error.headers or {})
    return Problem(error.status_code, "invalid_request_error", code, error.detail, None, headers)


def is_anthropic(path: str) -> bool:
    """Whether a path belongs to Anthropic's API."""
    return path.startswith("/v1/messages")


def add_error_handlers(app: FastAPI) -> None:
    """Have every exception answered in the dialect of its path."""
    for kind in (OffloadError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _answer)


async def _answer(request: Request, error: Exception) -> JSONResponse:
    problem = problem_of(error)
    if is_anthropic(request.url.path):
        body = problem.anthropic(getattr(request.state, "request_id", ""))
    else:
        body = problem.openai()
    # What comes after a body that was not read to its end is no request.
    closing = {"Connection": "close"} if problem.status == 413 else {}
    return JSONResponse(body, problem.status, headers={**problem.headers, **closing})
