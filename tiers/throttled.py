"""A tier as slow as some link: to measure on a fast machine what a slow one would do."""

import math
import threading
from collections.abc import Callable, Sequence

from torch import Tensor

from offload.errors import ConfigError, TransferTimeout
from offload.tiers.base import Tier
from offload.tiers.buffers import Buffers
from offload.tiers.transfer import Transfer
from offload.tiers.virtual_clock import Clock, RealClock
from offload.tiers.wrapped import WrappedTier
from offload.types import ChunkInfo, SlotId


class SerialLink:
    """A link that moves one request at a time, in the order in which they come.

    Any thread may call any method. Several tiers may share one link.

    Parameters
    ----------
    bytes_per_s : float
    request_s : float
        Of each request, on top of its bytes.
    clock : Clock, optional
        The machine's unless given.

    Raises
    ------
    ConfigError
        The speed is not positive, or ``request_s`` is negative or not finite.
    """

    def __init__(
        self, bytes_per_s: float, request_s: float = 0.0, clock: Clock | None = None
    ) -> None:
        if not (bytes_per_s > 0 and 0 <= request_s < math.inf):
            raise ConfigError(f"no link moves {bytes_per_s} bytes/s at {request_s} s a request")
        self.bytes_per_s = bytes_per_s
        self.request_s = request_s
        self.clock: Clock = RealClock() if clock is None else clock
        self._free_s = 0.0
        self._lock = threading.Lock()

    def reserve(self, num_bytes: float, num_requests: int) -> float:
        """Take the link for so much, after everything before; return when it will be over."""
        with self._lock:
            busy_s = num_requests * self.request_s + num_bytes / self.bytes_per_s
            self._free_s = max(self._free_s, self.clock.now_s()) + busy_s
            return self._free_s


class ThrottledTransfer:
    """A transfer that nobody sees end before its time on the link, or before the tier closes.

    Parameters
    ----------
    what : str
        Names the transfer in the message of a missed deadline.
    inner : Transfer
    due_s : float
        On ``clock``.
    clock : Clock
    interrupted : Event
        Once it is set, nothing is held back any more.
    """

    def __init__(
        self, what: str, inner: Transfer, due_s: float, clock: Clock, interrupted: threading.Event
    ) -> None:
        self.due_s = due_s
        self._what = what
        self._inner = inner
        self._clock = clock
        self._interrupted = interrupted

    @property
    def num_bytes(self) -> int:
        """Payload bytes of the transfer inside."""
        return self._inner.num_bytes

    def done(self) -> bool:  # noqa: D102 - docstring inherited
        is_due = self._clock.now_s() >= self.due_s or self._interrupted.is_set()
        return is_due and self._inner.done()

    def wait(self, timeout_s: float | None = None) -> None:  # noqa: D102 - docstring inherited
        started_s = self._clock.now_s()
        patience_s = math.inf if timeout_s is None else timeout_s
        self._clock.wait_until(min(self.due_s, started_s + patience_s), self._interrupted)
        if started_s + patience_s < self.due_s and not self._interrupted.is_set():
            raise TransferTimeout(
                f"{self._what}: not done after {timeout_s} s; the link is busy with it for "
                f"{self.due_s - started_s - patience_s:.3g} s more"
            )
        waited_s = self._clock.now_s() - started_s
        self._inner.wait(None if timeout_s is None else max(0.0, timeout_s - waited_s))

    def cancel(self) -> bool:  # noqa: D102 - docstring inherited
        is_cancelled = self._inner.cancel()
        if is_cancelled:
            self.due_s = -math.inf
        return is_cancelled


class ThrottledTier(WrappedTier):
    """Any tier, behind a link.

    Keeps the contract of a tier. The tier inside moves the bytes at once, at its own speed; the end
    of a transfer is held back until the link would have moved them, so that buffers belong to it
    for that long. A transfer that is cancelled has taken its time on the link all the same. No
    thread is started.

    Parameters
    ----------
    inner : Tier
        Closed with this one.
    link : SerialLink
        Reads and writes take turns on it, each slot one request.
    stored_bytes : callable, optional
        Bytes of some slots that a whole read of them moves over the link, as where chunks are
        stored compressed. By default what the transfer says that it moves.
    """

    def __init__(
        self,
        inner: Tier,
        link: SerialLink,
        stored_bytes: Callable[[Sequence[SlotId]], int] | None = None,
    ) -> None:
        super().__init__(inner)
        self.link = link
        self._stored_bytes = stored_bytes
        self._closing = threading.Event()

    def read(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], out: Sequence[Tensor]
    ) -> Transfer:
        """Read whole slots, no faster than the link; see ``Tier``."""
        num_bytes = None if self._stored_bytes is None else self._stored_bytes(slots)
        return self._hold("read", self.inner.read(slots, infos, out), len(slots), num_bytes)

    def read_parts(
        self,
        slots: Sequence[SlotId],
        infos: Sequence[ChunkInfo],
        parts: slice | Sequence[int],
        out: Sequence[Tensor] | Buffers,
        *,
        num_parts: int = 1,
        urgent: bool = True,
    ) -> Transfer:
        """Read parts, which cross the link decoded, no faster than it; see ``ReadsParts``.

        Raises
        ------
        ConfigError
            The tier inside reads whole chunks only.
        """
        transfer = self.inner_parts.read_parts(
            slots, infos, parts, out, num_parts=num_parts, urgent=urgent
        )
        return self._hold("read of parts", transfer, len(slots))

    def write(
        self, slots: Sequence[SlotId], infos: Sequence[ChunkInfo], src: Sequence[Tensor]
    ) -> Transfer:
        """Write, no faster than the link; see ``Tier``."""
        return self._hold("write", self.inner.write(slots, infos, src), len(slots))

    def close(self) -> None:
        """End what is held back, and close the tier inside. Idempotent."""
        self._closing.set()
        self.inner.close()

    def _hold(
        self, verb: str, inner: Transfer, num_slots: int, num_bytes: int | None = None
    ) -> ThrottledTransfer:
        what = f"{self.name} {verb} of {num_slots} chunks over a slow link"
        due_s = self.link.reserve(inner.num_bytes if num_bytes is None else num_bytes, num_slots)
        return ThrottledTransfer(what, inner, due_s, self.link.clock, self._closing)
