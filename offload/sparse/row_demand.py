"""What calls wait for: rows on the disk, for so long and no longer."""

import time
from dataclasses import dataclass

import numpy as np

from offload.errors import OffloadError, TransferTimeout
from offload.sparse.row_keys import Ints, RowKeys, Rows
from offload.sparse.row_reads import Landing, PieceReads
from offload.stats import Counters

Found = list[tuple[Ints, Rows]]
"""Keys, int64 [n], and their rows, uint8 [n, row_bytes]."""


class Demand:
    """Rows that one call wants, the best first.

    A read that another call had begun is joined. If that one fails it is tried again, because what
    failed may have been its neighbour; if one's own fails, that is an error.

    Parameters
    ----------
    reads : PieceReads
    names : RowKeys
    keys : ndarray, int64 [n]
        The best first. Their chunks are on the disk.

    Attributes
    ----------
    found : list of (keys, rows)
        What has arrived so far, rows that others wanted included.
    error : OffloadError or None
        What one's own read has failed with.
    """

    def __init__(self, reads: PieceReads, names: RowKeys, keys: Ints) -> None:
        self.found: Found = []
        self.error: OffloadError | None = None
        self._reads = reads
        self._wanted = names.wanted(keys)
        self._to_start = np.arange(len(self._wanted))
        self._flying: set[int] = set()
        self._own: set[int] = set()

    @property
    def is_over(self) -> bool:
        """Whether everything has arrived."""
        return not self._flying and not len(self._to_start)

    def start(self) -> None:
        """Join what is being read, and begin to read as much of the rest as there is room for.

        Raises
        ------
        OffloadError
            A read could not begin.
        """
        if not len(self._to_start):
            return
        waiting = self._wanted.some(self._to_start)
        left = self._reads.join(waiting)
        room = self._reads.room(is_urgent=True)
        begun = waiting.some(left[:room])
        self._reads.start(begun, is_urgent=True)
        self._own.update(begun.pieces.tolist())
        self._flying.update(np.delete(waiting.pieces, left[room:]).tolist())
        self._to_start = self._to_start[left[room:]]

    def take(self, landing: Landing) -> bool:
        """Take what is one's own of a read that has ended; return whether that is an error."""
        mine = self._flying.intersection(landing.pieces)
        if not mine:
            return False
        self._flying -= mine
        if landing.rows is not None:
            self.found.append((landing.keys, landing.rows))
        elif self._own.isdisjoint(mine):
            again = np.flatnonzero(np.isin(self._wanted.pieces, list(mine)))
            self._to_start = np.concatenate([again, self._to_start])
        else:
            self.error = landing.error
        return self.error is not None

    def wait(self, timeout_s: float) -> None:
        """Wait for a read that is wanted, or, if none was begun, for one that takes the room.

        Raises
        ------
        TransferTimeout
        """
        self._reads.wait(self._flying, timeout_s)


@dataclass(slots=True, eq=False)
class Sought:
    """Rows that were asked for, some of them perhaps on their way.

    Attributes
    ----------
    addresses : ndarray, int64 [num_heads, num_tokens]
        Zero where there is none yet.
    absent : tuple of ndarray, int64 [n]
        Head and place of those, the best first.
    keys : ndarray, int64 [n]
        Their keys.
    demand : Demand or None
    """

    addresses: Ints
    absent: tuple[Ints, Ints]
    keys: Ints
    demand: Demand | None = None

    @property
    def num_late(self) -> int:
        """Rows that are still not there."""
        return int(np.count_nonzero(self.addresses[self.absent] == 0))


class Demands:
    """The demands of calls that overlap: all are begun before the first one is waited for.

    Parameters
    ----------
    reads : PieceReads
    names : RowKeys
    counters : Counters

    Attributes
    ----------
    fresh : list of (keys, rows)
        What has arrived since ``clear``, for whomever.
    """

    def __init__(self, reads: PieceReads, names: RowKeys, counters: Counters) -> None:
        self.fresh: Found = []
        self._reads = reads
        self._names = names
        self._counters = counters
        self._open: list[Demand] = []

    @property
    def is_idle(self) -> bool:
        """Whether every demand that was begun was waited for."""
        return not self._open

    def begin(self, keys: Ints) -> Demand:
        """Begin to read rows, the best first."""
        demand = Demand(self._reads, self._names, keys)
        demand.start()
        self._open.append(demand)
        return demand

    def finish(self, demand: Demand, deadline_s: float | None, longest_s: float) -> None:
        """Wait for everything, or until time is up; what was begun then goes on.

        Parameters
        ----------
        demand : Demand
        deadline_s : float or None
            From now on. None: wait for everything, for each read ``longest_s`` at most.
        longest_s : float

        Raises
        ------
        CorruptChunk, StorageError
        TransferTimeout
            Without ``deadline_s`` only.
        """
        started_s = time.monotonic()
        try:
            while not self._advance(demand):
                left_s = longest_s
                if deadline_s is not None:
                    left_s = started_s + deadline_s - time.monotonic()
                    if left_s <= 0:
                        return
                try:
                    demand.wait(left_s)
                except TransferTimeout:
                    if deadline_s is None:
                        raise
        finally:
            self._open.remove(demand)
            self._counters.row_wait_s += time.monotonic() - started_s

    def clear(self) -> None:
        """Forget what has arrived, and the demands that nobody will wait for."""
        self.fresh.clear()
        self._open.clear()

    def _advance(self, demand: Demand) -> bool:
        """Take what has landed and start what there is room for; return whether a demand is over.

        Raises
        ------
        OffloadError
            One of its own reads has failed.
        """
        for landing in self._reads.landed():
            if landing.rows is not None:
                self.fresh.append((landing.keys, landing.rows))
            is_error = [each.take(landing) for each in self._open]
            if landing.rows is None and not any(is_error):
                self._counters.failed_row_reads += 1
        for each in self._open:
            each.start()
        if demand.error is not None:
            raise demand.error
        return demand.is_over


def addresses_among(found: Found, keys: Ints) -> Ints:
    """Return the address of each key's row among rows that were found; 0 where there is none."""
    if not found:
        return np.zeros(len(keys), dtype=np.int64)
    names = np.concatenate([part for part, _ in found])
    where = np.concatenate(
        [rows.ctypes.data + rows.strides[0] * np.arange(len(rows)) for _, rows in found]
    )
    order = np.argsort(names, kind="stable")
    at = order[np.searchsorted(names, keys, sorter=order).clip(max=len(names) - 1)]
    return np.where(names[at] == keys, where[at], 0)
