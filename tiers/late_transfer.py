"""A transfer that takes longer than it needs."""

import threading
import time
from collections.abc import Callable

from offload.errors import TransferTimeout
from offload.tiers.transfer import Transfer


class LateTransfer:
    """A transfer that nobody sees end before its time, or before ``interrupted`` is set.

    Parameters
    ----------
    what : str
        Names the transfer in the message of a missed deadline.
    inner : Transfer
    late_s : float
    interrupted : Event
    finish : callable
        Called by every ``wait`` that sees the transfer end well.
    """

    def __init__(
        self,
        what: str,
        inner: Transfer,
        late_s: float,
        interrupted: threading.Event,
        finish: Callable[[], None] = lambda: None,
    ) -> None:
        self._what = what
        self._inner = inner
        self._due_s = time.monotonic() + late_s
        self._interrupted = interrupted
        self._finish = finish

    @property
    def num_bytes(self) -> int:
        """Payload bytes of the transfer inside."""
        return self._inner.num_bytes

    def done(self) -> bool:  # noqa: D102 - docstring inherited
        is_due = time.monotonic() >= self._due_s or self._interrupted.is_set()
        return is_due and self._inner.done()

    def wait(self, timeout_s: float | None = None) -> None:  # noqa: D102 - docstring inherited
        started_s = time.monotonic()
        late_s = self._due_s - started_s
        if late_s > 0:
            patience_s = late_s if timeout_s is None else min(late_s, timeout_s)
            if not self._interrupted.wait(patience_s) and patience_s < late_s:
                raise TransferTimeout(
                    f"{self._what}: not done after {timeout_s} s, held back on purpose for "
                    f"{late_s - patience_s:.3g} s more"
                )
        if timeout_s is not None:
            timeout_s = max(0.0, timeout_s - (time.monotonic() - started_s))
        self._inner.wait(timeout_s)
        self._finish()

    def cancel(self) -> bool:  # noqa: D102 - docstring inherited
        is_cancelled = self._inner.cancel()
        if is_cancelled:
            self._due_s = 0.0
        return is_cancelled
