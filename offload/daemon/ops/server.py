"""The HTTP server under the daemon: uvicorn on a socket of ours, without its signal handling."""

import asyncio
import contextlib
import ipaddress
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import uvicorn

from offload.daemon.ops.configuration import Configuration, ServerSection
from offload.errors import ConfigError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

_GRACE_S: Final = 5
"""For answers that are being sent when the engine has stopped already."""

_TICKS_BETWEEN_LOOKS: Final = 10
_TCP_USER_TIMEOUT: Final = getattr(socket, "TCP_USER_TIMEOUT", None)


def listen(server: ServerSection) -> socket.socket:
    """Bind the configured address. Connections are taken when the server runs.

    Raises
    ------
    ConfigError
        The address is taken, or is none.
    """
    return _listen_on_path(server.uds.expanduser()) if server.uds else _listen_on_port(server)


def address_of(listener: socket.socket) -> str:
    """Return the URL of a listening socket: ``http://127.0.0.1:8000`` or ``unix:/path``."""
    if listener.family == socket.AF_UNIX:
        return f"unix:{listener.getsockname()}"
    host, port = listener.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class ListeningServer(uvicorn.Server):
    """Runs an application until ``should_exit``; signals are left to others.

    Connections that never finish the head of a request are ended after ``read_timeout``.

    Parameters
    ----------
    app : ASGI application
    configuration : Configuration

    Attributes
    ----------
    is_listening : asyncio.Event
    """

    def __init__(self, app: "ASGIApp", configuration: Configuration) -> None:
        limits = configuration.server.limits
        super().__init__(
            uvicorn.Config(
                cast("Any", app),  # uvicorn has types of its own for messages
                http="h11",
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=limits.connections,
                timeout_graceful_shutdown=_GRACE_S,
                h11_max_incomplete_event_size=limits.headers,
            )
        )
        self.is_listening = asyncio.Event()
        self._read_timeout_s = limits.read_timeout
        self._idle_since: dict[Any, float] = {}

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and say so."""
        await super().startup(sockets)
        self.is_listening.set()

    async def on_tick(self, counter: int) -> bool:
        """Look after connections as well."""
        if counter % _TICKS_BETWEEN_LOOKS == 0:
            self._end_stuck_connections(time.monotonic())
        return await super().on_tick(counter)

    def _end_stuck_connections(self, now: float) -> None:
        idle = {each for each in self.server_state.connections if _has_no_request(each)}
        self._idle_since = {each: self._idle_since.get(each, now) for each in idle}
        for connection, since in self._idle_since.items():
            if now - since > self._read_timeout_s:
                connection.transport.abort()


def _has_no_request(connection: Any) -> bool:
    return connection.cycle is None or connection.cycle.response_complete


def _listen_on_port(server: ServerSection) -> socket.socket:
    host = server.host.strip("[]")
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        family = socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if _TCP_USER_TIMEOUT is not None:
            # Accepted sockets inherit it: the kernel drops who does not take what was sent.
            timeout_ms = int(server.limits.write_timeout * 1e3)
            listener.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, timeout_ms)
        listener.bind((host, server.port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{server.port}: {error.strerror}") from error
    return listener


def _listen_on_path(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_dead_socket(path)
        # Between bind and chmod nobody else can connect.
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {path}: {error.strerror or error}") from error
    return listener


def _remove_dead_socket(path: Path) -> None:
    """Remove what a daemon left that was killed; one that answers stays."""
    if not path.exists() or not stat.S_ISSOCK(path.stat().st_mode):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
