"""What waiting on purpose is done by: the machine's clock, or one that moves when waited for."""

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time, and waits. Any thread may call any method."""

    def now_s(self) -> float:
        """Return seconds since some moment; never less than before."""
        ...

    def wait_until(self, due_s: float, interrupted: threading.Event) -> None:
        """Return when ``now_s`` has reached ``due_s``, or once ``interrupted`` is set."""
        ...


class RealClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:  # noqa: D102 - docstring inherited
        return time.monotonic()

    def wait_until(self, due_s: float, interrupted: threading.Event) -> None:  # noqa: D102
        while (left_s := due_s - time.monotonic()) > 0 and not interrupted.wait(left_s):
            pass


class VirtualClock:
    """A clock that stands still until somebody waits, and then is there at once.

    Invariant: the time never goes back.
    """

    def __init__(self) -> None:
        self._now_s = 0.0
        self._lock = threading.Lock()

    def now_s(self) -> float:  # noqa: D102 - docstring inherited
        return self._now_s

    def wait_until(self, due_s: float, interrupted: threading.Event) -> None:  # noqa: D102
        if not interrupted.is_set():
            with self._lock:
                self._now_s = max(self._now_s, due_s)
