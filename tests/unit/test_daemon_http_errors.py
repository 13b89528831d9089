"""What goes wrong has the status, type and code that clients go by."""

import logging

import pytest
from starlette.exceptions import HTTPException

from offload.daemon import errors
from offload.daemon.http.errors import NotFound, Unauthorised, problem_of
from offload.errors import CapacityError, ClosedError, ConfigError, DiskFull, StorageError

TABLE = [
    (errors.Draining("x"), 503, "unavailable_error", "unavailable"),
    (errors.SessionBusy("x"), 409, "conflict_error", "session_busy"),
    (errors.QueueFull("x", 3), 429, "rate_limit_exceeded", "rate_limit_exceeded"),
    (errors.QuotaExceeded("x"), 429, "insufficient_quota", "insufficient_quota"),
    (DiskFull("x"), 503, "server_error", "storage_unavailable"),
    (errors.ContextTooLong(9, 8), 400, "exceed_context_size_error", "context_length_exceeded"),
    (errors.ModelNotFound("x"), 404, "invalid_request_error", "model_not_found"),
    (errors.UnknownSession("x"), 404, "invalid_request_error", "session_not_found"),
    (errors.Incompatible("x"), 409, "conflict_error", "kv_incompatible"),
    (errors.BadRequest("x", "n"), 400, "invalid_request_error", "invalid_request"),
    (Unauthorised("x"), 401, "authentication_error", "invalid_api_key"),
    (NotFound("x"), 404, "invalid_request_error", "not_found"),
    (HTTPException(413, "x"), 413, "invalid_request_error", "request_too_large"),
    (ConfigError("x"), 400, "invalid_request_error", "invalid_request"),
    (ClosedError("x"), 503, "unavailable_error", "unavailable"),
    (CapacityError("x"), 503, "unavailable_error", "no_capacity"),
    (ZeroDivisionError("x"), 500, "server_error", "internal_error"),
]


def name_of(value: object) -> str:
    return type(value).__name__ if isinstance(value, Exception) else ""


@pytest.mark.parametrize(("error", "status", "kind", "code"), TABLE, ids=name_of)
def test_problem_of_an_exception_is_the_one_of_the_table(
    error: Exception, status: int, kind: str, code: str
) -> None:
    problem = problem_of(error)
    assert (problem.status, problem.type, problem.code) == (status, kind, code)


@pytest.mark.parametrize(
    ("error", "header", "value"),
    [
        (errors.QueueFull("x", 3.4), "Retry-After", "3"),
        (errors.QueueFull("x", 0.01), "Retry-After", "1"),
        (errors.Draining("x"), "Retry-After", "2"),
        (errors.SessionBusy("x"), "Retry-After", "2"),
        (errors.SessionBusy("x", 28.2), "Retry-After", "29"),
        (errors.QuotaExceeded("x"), "x-should-retry", "false"),
        (errors.Incompatible("x"), "x-should-retry", "false"),
        (DiskFull("x"), "x-should-retry", "false"),
        (StorageError("x"), "Retry-After", "2"),
        (Unauthorised("x"), "WWW-Authenticate", "Bearer"),
    ],
    ids=name_of,
)
def test_problem_says_whether_and_when_to_try_again(
    error: Exception, header: str, value: str
) -> None:
    assert problem_of(error).headers[header] == value


def test_prompt_that_is_too_long_comes_with_its_numbers() -> None:
    error = problem_of(errors.ContextTooLong(9, 8)).openai()["error"]
    assert (error["n_prompt_tokens"], error["n_ctx"]) == (9, 8)


@pytest.mark.parametrize("kind", [StorageError, DiskFull, RuntimeError])
def test_problem_of_the_server_names_none_of_its_paths(
    kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        message = problem_of(kind("/secret/path failed")).message
    assert "/secret" not in message
    assert "/secret" in caplog.text


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (404, "not_found_error"), (413, "request_too_large")],
)
def test_problem_for_anthropics_clients_has_their_types(status: int, kind: str) -> None:
    body = problem_of(HTTPException(status, "x")).anthropic("req_1")
    assert body == {
        "type": "error",
        "error": {"type": kind, "message": "x"},
        "request_id": "req_1",
    }
