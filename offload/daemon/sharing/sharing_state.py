"""What is counted about shared sessions: by their threads, read by any."""

import logging
import threading
import time
from dataclasses import dataclass

_LOG = logging.getLogger(__name__)

_PAUSES_S = (1.0, 60.0)
"""Least and most that an object store that has failed is left alone."""


@dataclass(frozen=True, slots=True)
class SharingState:
    """Shared sessions, since the start unless said otherwise.

    Attributes
    ----------
    is_reachable : bool
        Whether the last thing that was asked of the object store was done.
    num_held : int
        Sessions that only this replica may write, now.
    num_unpublished : int
        Sessions that may have something that others cannot see, now.
    publications, published_bytes : int
        Bytes of keys and values that were uploaded, as stored.
    fetches, fetched_bytes : int
    failures : int
        Things that the object store, or the local disk, did not do.
    lost_leases : int
        Sessions that another replica has taken over while this one went on with them.
    """

    is_reachable: bool = True
    num_held: int = 0
    num_unpublished: int = 0
    publications: int = 0
    published_bytes: int = 0
    fetches: int = 0
    fetched_bytes: int = 0
    failures: int = 0
    lost_leases: int = 0


class SharingTally:
    """Counts, and knows when an object store that has failed is worth another try. Any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = dict.fromkeys(
            (
                *("publications", "published_bytes", "fetches", "fetched_bytes"),
                *("failures", "lost_leases"),
            ),
            0,
        )
        self._failures_in_a_row = 0
        self._retry_at_s = 0.0

    @property
    def is_resting(self) -> bool:
        """Whether the object store has failed a moment ago, and is left alone."""
        return time.monotonic() < self._retry_at_s

    def add(self, **counts: int) -> None:
        """Count something that was done."""
        with self._lock:
            for name, count in counts.items():
                self._counts[name] += count

    def succeed(self) -> None:
        """Note that the object store does what it is asked to."""
        with self._lock:
            was_down, self._failures_in_a_row = bool(self._failures_in_a_row), 0
            self._retry_at_s = 0.0
        if was_down:
            _LOG.info("shared sessions: the object store is back")

    def fail(self, error: Exception) -> None:
        """Count a failure; the first in a row is logged."""
        with self._lock:
            self._counts["failures"] += 1
            pause_s = min(_PAUSES_S[0] * 2**self._failures_in_a_row, _PAUSES_S[1])
            self._failures_in_a_row = min(self._failures_in_a_row + 1, 16)
            self._retry_at_s = time.monotonic() + pause_s
            is_first = self._failures_in_a_row == 1
        if is_first:
            _LOG.warning("shared sessions are not shared now: %s", error)

    def state(self, num_held: int, num_unpublished: int) -> SharingState:
        """Return a copy."""
        with self._lock:
            return SharingState(
                is_reachable=not self._failures_in_a_row,
                num_held=num_held,
                num_unpublished=num_unpublished,
                **self._counts,
            )
