"""Token ids that grow at their end, and how far two of them agree."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]

_FIRST_BLOCK = 64


class TokenLog:
    """A growing array of token ids.

    Parameters
    ----------
    ids : sequence of int
    """

    def __init__(self, ids: Sequence[int] | TokenIds = ()) -> None:
        self._ids: TokenIds = np.array(ids, dtype=np.int32)
        self._length = len(self._ids)

    def __len__(self) -> int:
        return self._length

    @property
    def view(self) -> TokenIds:
        """The ids, as a view that is valid until the next change."""
        return self._ids[: self._length]

    def extend(self, ids: Sequence[int] | TokenIds) -> None:
        """Add ids at the end."""
        length = self._length + len(ids)
        if length > len(self._ids):
            grown = np.empty(max(length, 2 * len(self._ids)), dtype=np.int32)
            grown[: self._length] = self.view
            self._ids = grown
        self._ids[self._length : length] = ids
        self._length = length

    def truncate(self, length: int) -> None:
        """Keep the first ids."""
        self._length = min(self._length, length)


def num_common(first: TokenIds, second: TokenIds) -> int:
    """Return how many ids two arrays begin with in common.

    Looks at twice as many each time, since most pairs differ at once.
    """
    limit, start, size = min(len(first), len(second)), 0, _FIRST_BLOCK
    while start < limit:
        stop = min(start + size, limit)
        different = np.flatnonzero(first[start:stop] != second[start:stop])
        if len(different):
            return start + int(different[0])
        start, size = stop, 2 * size
    return limit
