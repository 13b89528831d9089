"""Token rows in host memory, by key. Knows neither chunks nor disks."""

import numpy as np
from numpy.typing import NDArray

WAYS = 8
"""Lines of a set. Eight flags are one byte, which is how a whole set is compared at once."""

_NO_KEY = -1
_NEVER = -1
_BOOK_BYTES = 16
"""Key and time of last use of a line."""

_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
# Place of the flag that is set in a byte of eight, first flag highest; of 0 it means nothing.
_PLACE = np.array([8 - max(1, value.bit_length()) for value in range(256)], dtype=np.int64)

Keys = NDArray[np.int64]
Rows = NDArray[np.uint8]


def lines_that_fit(num_bytes: int, row_bytes: int) -> int:
    """Return how many lines so many bytes hold, their books included: a multiple of ``WAYS``."""
    return num_bytes // (WAYS * (row_bytes + _BOOK_BYTES)) * WAYS


class LineCache:
    """Rows that were read before, so that they need not be read again.

    Set-associative, as the caches of processors are: a key may lie in the eight lines of one set,
    and displaces the one of them that was not used for the longest time. So a look-up of any number
    of keys is a few array operations, and the books have a fixed size.

    Invariant: a key lies in at most one line, one of its set. Not thread-safe.

    Parameters
    ----------
    rows : ndarray, uint8 [num_lines, row_bytes], C-contiguous
        Where the rows are kept; a multiple of ``WAYS`` lines, none is allowed.
    """

    def __init__(self, rows: Rows) -> None:
        assert len(rows) % WAYS == 0
        self._rows = rows
        self._num_sets = len(rows) // WAYS
        self._keys = np.full(len(rows), _NO_KEY, dtype=np.int64)
        self._last_use = np.full(len(rows), _NEVER, dtype=np.int64)
        self._time = 0

    @property
    def num_lines(self) -> int:
        """Lines, used or not."""
        return len(self._rows)

    @property
    def num_used(self) -> int:
        """Lines that hold a row."""
        return int(np.count_nonzero(self._keys != _NO_KEY))

    def tick(self) -> None:
        """Let time pass: rows found or inserted from now on count as used later."""
        self._time += 1

    def find(self, keys: Keys) -> Keys:
        """Return the addresses of rows, and count them as used now.

        Parameters
        ----------
        keys : ndarray, int64 [n]
            Not negative.

        Returns
        -------
        ndarray, int64 [n]
            Of the first byte of each row, valid until the next ``insert``; 0 where there is none.
        """
        lines = self._lines(keys)
        found = lines >= 0
        self._last_use[lines[found]] = self._time
        return np.where(found, self._rows.ctypes.data + lines * self._rows.shape[1], 0)

    def insert(self, keys: Keys, rows: Rows) -> None:
        """Keep rows; of those that compete for one set, eight.

        Parameters
        ----------
        keys : ndarray, int64 [n]
            Not negative. What is there already, and repeated ones, count as used.
        rows : ndarray, uint8 [n, row_bytes]
        """
        if not self._num_sets or not len(keys):
            return
        keys, sources = np.unique(keys, return_index=True)
        is_new = self.find(keys) == 0
        keys, sources = keys[is_new], sources[is_new]
        sets = self._sets(keys)
        order = np.argsort(sets, kind="stable")
        keys, sources, sets = keys[order], sources[order], sets[order]
        rank = np.arange(len(sets)) - np.searchsorted(sets, sets)
        keys, sources, sets, rank = (part[rank < WAYS] for part in (keys, sources, sets, rank))
        oldest = np.argsort(self._last_use.reshape(-1, WAYS)[sets], axis=1, kind="stable")
        lines = sets * WAYS + oldest[np.arange(len(sets)), rank]
        self._keys[lines] = keys
        self._last_use[lines] = self._time
        self._rows[lines] = rows[sources]

    def drop(self, starts: Keys, length: int) -> None:
        """Forget every key from ``start`` to ``start + length``, for each start.

        Parameters
        ----------
        starts : ndarray, int64 [n]
            Multiples of ``length``.
        length : int
        """
        if len(starts) * length < self.num_lines:
            lines = self._lines((starts[:, None] + np.arange(length)).reshape(-1))
            lines = lines[lines >= 0]
        else:  # one pass over all lines is less than a look-up of so many keys
            lines = np.nonzero(np.isin(self._keys // length * length, starts))[0]
        self._keys[lines] = _NO_KEY
        self._last_use[lines] = _NEVER

    def check_integrity(self) -> None:
        """Raise AssertionError if the invariant does not hold."""
        lines = np.nonzero(self._keys != _NO_KEY)[0]
        assert len(np.unique(self._keys[lines])) == len(lines), "a key lies in two lines"
        assert (self._sets(self._keys[lines]) == lines // WAYS).all(), "a key is in another's set"

    def _sets(self, keys: Keys) -> Keys:
        spread = keys.view(np.uint64) * _SPREAD >> _HALF
        return (spread * np.uint64(self._num_sets) >> _HALF).view(np.int64)

    def _lines(self, keys: Keys) -> Keys:
        """Return the line of each key, negative where there is none."""
        if not self._num_sets:
            return np.full(len(keys), -1, dtype=np.int64)
        sets = self._sets(keys)
        # ``take`` gathers whole sets three times as fast as indexing does.
        candidates = np.take(self._keys.reshape(-1, WAYS), sets, axis=0)
        flags = np.packbits(candidates == keys[:, None])
        return np.where(flags != 0, sets * WAYS + np.take(_PLACE, flags), -1)
