"""Refusals that are written without the application, each in the dialect of its path."""

import json
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from starlette.types import Send

_ANTHROPIC: Final = "/v1/messages"
_ANTHROPIC_TYPES: Final = {
    401: "authentication_error",
    403: "permission_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


async def refuse(
    send: "Send",
    path: str,
    status: int,
    message: str,
    *,
    kind: str,
    code: str | None = None,
    retry_after_s: int | None = None,
) -> None:
    """Answer with an error, and ask for the connection to be closed.

    Parameters
    ----------
    send : callable
        Of the server.
    path : str
        Decides the shape: Anthropic's below ``/v1/messages``, else OpenAI's.
    status : int
    message : str
    kind, code : str
        ``type`` and ``code`` of OpenAI's shape.
    retry_after_s : int, optional
    """
    if path.startswith(_ANTHROPIC):
        error = {"type": _ANTHROPIC_TYPES.get(status, "api_error"), "message": message}
        content: dict[str, object] = {"type": "error", "error": error, "request_id": None}
    else:
        content = {"error": {"message": message, "type": kind, "param": None, "code": code or kind}}
    body = json.dumps(content).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if retry_after_s is not None:
        headers.append((b"retry-after", str(retry_after_s).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
