"""Rows that are wanted, piece by piece, as arrays: a step wants hundreds of pieces."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """Pieces, those first that are needed first, and the rows that are wanted of each.

    Attributes
    ----------
    pieces : ndarray, int64 [num_pieces]
    keys : ndarray, int64 [num_rows]
        Piece by piece.
    ends : ndarray, int64 [num_pieces + 1]
        Where the keys of each piece begin, and where those of the last one end.
    """

    pieces: Ints
    keys: Ints
    ends: Ints

    @classmethod
    def of(cls, keys: Ints, pieces: Ints) -> "Wanted":
        """Group keys by the piece of each; pieces in the order of their first keys."""
        names, first, which = np.unique(pieces, return_index=True, return_inverse=True)
        order = np.argsort(first, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        ranks = rank[which]
        ends = np.concatenate([[0], np.cumsum(np.bincount(ranks, minlength=len(order)))])
        return cls(names[order], keys[np.argsort(ranks, kind="stable")], ends)

    def __len__(self) -> int:
        return len(self.pieces)

    def part(self, place: int) -> Ints:
        """Return the keys of one piece."""
        return self.keys[self.ends[place] : self.ends[place + 1]]

    def some(self, places: Ints) -> "Wanted":
        """Return the pieces at some places, in that order."""
        starts, sizes = self.ends[places], self.ends[places + 1] - self.ends[places]
        ends = np.concatenate([[0], np.cumsum(sizes)])
        at = np.repeat(starts - ends[:-1], sizes) + np.arange(ends[-1])
        return Wanted(self.pieces[places], self.keys[at], ends)

    def run(self, start: int, stop: int) -> "Wanted":
        """Return the pieces from ``start`` to ``stop``."""
        ends = self.ends[start : stop + 1]
        return Wanted(self.pieces[start:stop], self.keys[ends[0] : ends[-1]], ends - ends[0])
