"""What one call waits for: rows on the disk, for so long and no longer."""

import time
from collections import deque

import numpy as np

from offload.errors import TransferTimeout
from offload.sparse.row_keys import Ints, RowKeys, Rows
from offload.sparse.row_reads import Landing, PieceReads
from offload.stats import Counters

Found = list[tuple[Ints, Rows]]
"""Keys, int64 [n], and their rows, uint8 [n, row_bytes]."""


class Demand:
    """Reads rows, the first ones first, until all are there or time is up.

    A read that another call had begun is joined. If that one fails it is tried again, because what
    failed may have been its neighbour; if one's own fails, that is an error.

    Parameters
    ----------
    reads : PieceReads
    names : RowKeys
    keys : ndarray, int64 [n]
        The best first. Their chunks are on the disk.
    counters : Counters
    """

    def __init__(self, reads: PieceReads, names: RowKeys, keys: Ints, counters: Counters) -> None:
        self._reads = reads
        self._counters = counters
        self._missing = names.by_piece(keys)
        self._to_start = deque(
            piece for piece, part in self._missing.items() if not reads.join(piece, part)
        )
        self._own: set[int] = set()
        self.found: Found = []
        """What has arrived so far, rows that others wanted included."""

    def run(self, deadline_s: float | None, longest_s: float) -> None:
        """Wait for everything, or until time is up; what was begun then goes on.

        Parameters
        ----------
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
            while self._advance():
                left_s = longest_s
                if deadline_s is not None:
                    left_s = started_s + deadline_s - time.monotonic()
                    if left_s <= 0:
                        return
                try:
                    self._reads.wait(self._missing, left_s)
                except TransferTimeout:
                    if deadline_s is None:
                        raise
        finally:
            self._counters.row_wait_s += time.monotonic() - started_s

    def _advance(self) -> bool:
        """Take what has landed and start what there is room for; return whether some is missing."""
        for landing in self._reads.landed():
            self._take(landing)
        room = min(len(self._to_start), self._reads.room(is_urgent=True))
        pieces = [self._to_start.popleft() for _ in range(room)]
        self._own.update(pieces)
        self._reads.start([(piece, self._missing[piece]) for piece in pieces], is_urgent=True)
        return bool(self._missing)

    def _take(self, landing: Landing) -> None:
        mine = [piece for piece in landing.pieces if piece in self._missing]
        if landing.rows is not None:
            self.found.append((landing.keys, landing.rows))
            for piece in mine:
                del self._missing[piece]
        elif self._own.isdisjoint(mine):
            self._counters.failed_row_reads += 1
            self._to_start.extendleft(reversed(mine))
        else:
            assert landing.error is not None
            raise landing.error


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
