"""Tells systemd how the daemon is; does nothing where nobody listens. See ``sd_notify(3)``."""

import os
import socket
import time
from collections.abc import Mapping


class Notifier:
    """Sends the states that a unit of ``Type=notify-reload`` expects.

    Parameters
    ----------
    env : mapping of str to str, optional
        Names the socket, ``NOTIFY_SOCKET``; the process's environment by default.
    """

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        env = os.environ if env is None else env
        address = env.get("NOTIFY_SOCKET", "")
        # An @ stands for the zero byte of an abstract address.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        is_ours = env.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = int(env.get("WATCHDOG_USEC", "0")) / 1e6 if is_ours else 0.0

    def send(self, **states: object) -> None:
        """Send states, such as ``READY=1`` and ``STATUS="…"``. Never blocks and never fails."""
        if not self._address:
            return
        text = "\n".join(f"{name}={value}" for name, value in states.items())
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as channel:
            try:
                channel.sendto(text.encode(), self._address)
            except OSError:  # nobody there: there is nobody to tell
                self._address = ""

    def reloading(self) -> None:
        """Say that a reload has begun; ``READY=1`` ends it."""
        self.send(RELOADING=1, MONOTONIC_USEC=time.monotonic_ns() // 1000)

    def extend(self, seconds: float) -> None:
        """Ask for so long before the next sign of life is due."""
        self.send(EXTEND_TIMEOUT_USEC=int(seconds * 1e6))
