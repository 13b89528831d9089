"""Blocks that are stored or loaded together, and what became of each of them."""

import threading
import time
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.uint8]
"""Memory of one block, ``[row_bytes]``."""


class Batch:
    """Blocks on their way between the memory of a caller and the disk.

    The memory is touched only while the batch is not over: the disk has buffers of its own, so a
    batch can be given up at any time, also while a disk hangs. Any thread may call any method.

    Parameters
    ----------
    rows : sequence of Row
        Belongs to the batch until it is over.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._lock = threading.Lock()
        self._rows: list[Row | None] = list(rows)
        self._results: list[bool | None] = [None] * len(self._rows)
        self._num_open = len(self._rows)
        self._over = threading.Event()
        self.is_given_up = False
        """Whether something was still under way when nobody waited for it any more."""
        self.begun_s = self.ended_s = time.monotonic()
        if not self._rows:
            self._over.set()

    @property
    def is_over(self) -> bool:
        """Whether the fate of every block is known."""
        return self._over.is_set()

    @property
    def results(self) -> list[bool]:
        """Which blocks arrived, in the order of the rows; those that may still do have not."""
        with self._lock:
            return [bool(result) for result in self._results]

    def take(self, member: int, buffer: Row) -> bool:
        """Copy a row into a buffer; False if it was given up."""
        with self._lock:
            row = self._rows[member]
            if row is not None:
                buffer[: len(row)] = row
            return row is not None

    def give(self, member: int, buffer: Row) -> bool:
        """Copy a buffer into a row, which has then arrived; False if it was given up."""
        with self._lock:
            row = self._rows[member]
            if row is not None:
                row[:] = buffer[: len(row)]
                self._settle(member, arrived=True)
            return row is not None

    def settle(self, members: Iterable[int], *, arrived: bool) -> None:
        """Say what became of blocks whose fate is not known yet."""
        with self._lock:
            for member in members:
                self._settle(member, arrived=arrived)

    def give_up(self) -> int:
        """Say that what has not arrived never will; return how many blocks that are."""
        with self._lock:
            num_open = self._num_open
            self.is_given_up |= num_open > 0
            for member in range(len(self._results)):
                self._settle(member, arrived=False)
            return num_open

    def wait(self, timeout_s: float) -> bool:
        """Block until the batch is over; False if it is not after ``timeout_s``."""
        return self._over.wait(timeout_s)

    def _settle(self, member: int, *, arrived: bool) -> None:
        if self._results[member] is not None:
            return
        self._results[member] = arrived
        self._rows[member] = None
        self._num_open -= 1
        if not self._num_open:
            self.ended_s = time.monotonic()
            self._over.set()
