"""Addresses that only this machine can reach, and listening at them."""

import ipaddress
import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from offload.errors import ConfigError

_UNIX = "unix:"


@dataclass(frozen=True, slots=True)
class Address:
    """Where to listen: a port of the loopback interface, or a socket in the file system.

    Attributes
    ----------
    host : str
        A numeric address; empty for a path.
    port : int
    path : Path or None
    """

    host: str
    port: int
    path: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``127.0.0.1:PORT``, ``[::1]:PORT``, ``localhost:PORT`` or ``unix:PATH``.

        Raises
        ------
        ConfigError
            It is none of these; names are not looked up.
        """
        if text.startswith(_UNIX) and len(text) > len(_UNIX):
            return cls("", 0, Path(text[len(_UNIX) :]))
        host, colon, port = text.rpartition(":")
        host = {"localhost": "127.0.0.1"}.get(host, host.strip("[]"))
        try:
            is_local = ipaddress.ip_address(host).is_loopback
        except ValueError:
            is_local = False
        if not (colon and is_local and port.isdecimal() and int(port) < 1 << 16):
            raise ConfigError(
                f"{text!r}: questions are taken at 127.0.0.1:PORT, [::1]:PORT or unix:PATH, which "
                "only this machine can reach; for others, forward it over ssh"
            )
        return cls(host, int(port))

    def of(self, listener: socket.socket) -> str:
        """Return the address as text, with the port that a listener got."""
        if self.path is not None:
            return f"{_UNIX}{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{listener.getsockname()[1]}"

    def remove(self) -> None:
        """Remove the socket from the file system, if it is one."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


def listen(address: Address) -> socket.socket:
    """Begin to listen. A path is for its owner only, and one that was left behind is replaced.

    Raises
    ------
    ConfigError
        Somebody listens there, or the system refuses.
    """
    is_ipv6 = ":" in address.host
    kind = socket.AF_UNIX if address.path else socket.AF_INET6 if is_ipv6 else socket.AF_INET
    listener = socket.socket(kind, socket.SOCK_STREAM)
    try:
        if address.path is None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address.host, address.port))
        else:
            _remove_leftover(address.path)
            before = os.umask(0o177)
            try:
                listener.bind(str(address.path))
            finally:
                os.umask(before)
        listener.listen()
    except OSError as error:
        listener.close()
        where = address.path or f"{address.host}:{address.port}"
        raise ConfigError(f"cannot listen at {where}: {error.strerror or error}") from error
    return listener


def _remove_leftover(path: Path) -> None:
    """Remove a socket at which nobody listens; anything else stays, and is in the way."""
    if path.exists() and stat.S_ISSOCK(path.stat().st_mode):
        with socket.socket(socket.AF_UNIX) as probe, suppress(ConnectionRefusedError):
            probe.connect(str(path))
            return
        path.unlink()
