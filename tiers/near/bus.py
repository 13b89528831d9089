"""What crosses between the runtime and its workers."""

import threading
from typing import NamedTuple


class BusBytes(NamedTuple):
    """Bytes so far.

    Attributes
    ----------
    asked, answered : int
        Queries with the changes to what rows consist of, and partial results.
    written, fetched : int
        Keys and values, down and up.
    read : int
        From disks, by workers that attend: what did not have to cross.
    num_reads : int
        Requests in which that was read.
    """

    asked: int = 0
    answered: int = 0
    written: int = 0
    fetched: int = 0
    read: int = 0
    num_reads: int = 0


class BusMeter:
    """Counts bytes. Any thread may call any method."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bytes = BusBytes()

    @property
    def bytes(self) -> BusBytes:
        """What crossed so far."""
        return self._bytes

    def add(self, more: BusBytes) -> None:
        """Count bytes."""
        with self._lock:
            self._bytes = BusBytes(*(a + b for a, b in zip(self._bytes, more, strict=True)))
