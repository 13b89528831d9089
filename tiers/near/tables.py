"""Which chunks a worker knows to be those of a row, so that only changes are sent."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offload.tiers.near.messages import TableUpdate

_NOTHING = np.empty(0, np.int64)
Slots = NDArray[np.int64]


def update_of(known: dict[int, Slots], key: int, slots: Slots) -> TableUpdate:
    """Return what to tell a worker of a row, and note that it was told.

    Parameters
    ----------
    known : dict of int to ndarray
        What the worker was told; changed.
    key : int
        Of the row.
    slots : ndarray, int64 [num_chunks]
    """
    before = known.get(key, _NOTHING)
    if before is slots:
        return TableUpdate(key, len(slots), _NOTHING)
    common = min(len(before), len(slots))
    differs = before[:common] != slots[:common]
    kept = int(differs.argmax()) if differs.any() else common
    known[key] = slots
    return TableUpdate(key, kept, slots[kept:])


class Lanes:
    """Guesses the row of the batch from the order in which chunks are written.

    Rows of a batch are written one after the other, all with the same first token.
    """

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, int]] = {}

    def of(self, layer: int, first_token: int) -> tuple[int, int]:
        """Return the lane of the next chunk of a layer."""
        token, row = self._last.get(layer, (-1, -1))
        row = row + 1 if token == first_token else 0
        self._last[layer] = first_token, row
        return layer, row

    def of_all(self, places: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Return the lanes of chunks given by layer and first token."""
        return [self.of(*place) for place in places]
