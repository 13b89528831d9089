"""Talks to a running daemon: JSON and server-sent events over a port or a Unix socket."""

import argparse
import http.client
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote, urlsplit

from offload.errors import ConfigError

DEFAULT_URL: Final = "http://127.0.0.1:8000"
URL_VARIABLE: Final = "OFFLOAD_URL"
KEY_VARIABLE: Final = "OFFLOAD_API_KEY"
_UNIX: Final = "unix:"
_TIMEOUT_S: Final = 3600.0
_COPY_BYTES: Final = 1 << 20
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

Event = tuple[str, Any]
"""Name, and data; ``None`` for the end of OpenAI's streams."""


def add_client_options(parser: argparse.ArgumentParser) -> None:
    """Add where the daemon is. The key is not an option: others could see it."""
    text = f"of the daemon (default: ${URL_VARIABLE}, or {DEFAULT_URL}); unix:PATH for a socket"
    parser.add_argument("--url", metavar="URL", help=f"{text}; a key comes from ${KEY_VARIABLE}")


def client_of(args: argparse.Namespace) -> "DaemonClient":
    """Return a client for the daemon that the command line or the environment names."""
    url = args.url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
    return DaemonClient(url, os.environ.get(KEY_VARIABLE))


class DaemonClient:
    """One daemon. Every call opens a connection of its own; use it from any thread.

    Every call raises ConfigError if nobody answers, or the daemon refuses; with what it says.

    Parameters
    ----------
    url : str
        ``http://host:port`` or ``unix:/path``.
    key : str or None
    """

    def __init__(self, url: str, key: str | None = None) -> None:
        self.url = url.rstrip("/")
        self._key = key
        if not self.url.startswith((_UNIX, "http://", "https://")):
            raise ConfigError(f"{url!r} is not http://HOST:PORT, https://… or unix:PATH")

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Return the JSON that the daemon answers with; None for nothing."""
        with closing(self._connect()) as connection:
            response = self._request(connection, method, path, body)
            content = response.read()
        return json.loads(content) if content else None

    def events(self, path: str, body: Any = None) -> Iterator[Event]:
        """Yield server-sent events as they come; GET without a body, else POST.

        Closing the iterator hangs up.
        """
        with closing(self._connect()) as connection:
            method = "GET" if body is None else "POST"
            yield from _read_events(self._request(connection, method, path, body))

    def download(self, path: str, file: Path) -> int:
        """Write what is at a path to a new file, and return its bytes."""
        with closing(self._connect()) as connection:
            response = self._request(connection, "GET", path, None)
            with file.open("xb") as target:
                while piece := response.read(_COPY_BYTES):
                    target.write(piece)
                return target.tell()

    def upload(self, path: str, file: Path) -> Any:
        """Send a file, and return the JSON that the daemon answers with."""
        with closing(self._connect()) as connection, file.open("rb") as source:
            response = self._request(connection, "POST", path, source)
            return json.loads(response.read())

    def _connect(self) -> http.client.HTTPConnection:
        if self.url.startswith(_UNIX):
            return _UnixConnection(self.url.removeprefix(_UNIX))
        parts = urlsplit(self.url)
        is_plain = parts.scheme == "http"
        kind = http.client.HTTPConnection if is_plain else http.client.HTTPSConnection
        return kind(parts.hostname or "", parts.port, timeout=_TIMEOUT_S)

    def _request(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Any
    ) -> http.client.HTTPResponse:
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        is_file = hasattr(body, "read")
        if body is not None:
            kind = "application/octet-stream" if is_file else "application/json"
            headers["Content-Type"] = kind
            body = body if is_file else json.dumps(body).encode()
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise ConfigError(
                f"no daemon answers at {self.url}: {error or type(error).__name__}; "
                "is `offload serve` running?"
            ) from error
        if response.status >= 400:
            raise ConfigError(f"{self.url} refused ({response.status}): {_said(response)}")
        return response


def session_path(name: str, action: str = "") -> str:
    """Return the path of a session, or of something that can be done with it."""
    return f"/v1/sessions/{quote(name, safe='')}{'/' + action if action else ''}"


def printable(text: str) -> str:
    """Return text that came from a daemon without what would steer a terminal."""
    return _CONTROLS.sub("\ufffd", text)


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT_S)
        self.sock.connect(self._path)


def _read_events(response: http.client.HTTPResponse) -> Iterator[Event]:
    name, data = "message", ""
    for raw in response:
        line = raw.decode().rstrip("\r\n")
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            data += value
        elif not line and data:
            yield name, None if data == "[DONE]" else json.loads(data)
            name, data = "message", ""


def _said(response: http.client.HTTPResponse) -> str:
    text = response.read(65536).decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return text[:500] or response.reason
