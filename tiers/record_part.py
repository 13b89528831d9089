"""What is wanted of records: of one, and of many."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from offload.tiers.buffers import Buffer, Buffers, Ints
from offload.tiers.record_io import Place
from offload.tiers.segment import locate_all
from offload.types import ChunkInfo, SlotId


class Part(NamedTuple):
    """What is wanted of one record.

    Attributes
    ----------
    place : tuple of int
        Segment and index.
    info : ChunkInfo
    first : int
        The unit of a raw record that it starts with.
    out : Buffer
        For whole units of a raw record.
    """

    place: Place
    info: ChunkInfo
    first: int
    out: Buffer


class Parts(NamedTuple):
    """Parts of one size, as arrays: a step of sparse attention wants hundreds of them.

    Attributes
    ----------
    segments, indexes, firsts : ndarray, int64 [num_parts]
        As in ``Part``.
    infos : sequence of ChunkInfo
    out : Buffers
    """

    segments: Ints
    indexes: Ints
    firsts: Ints
    infos: Sequence[ChunkInfo]
    out: Buffers

    @classmethod
    def of(
        cls,
        slots: Sequence[SlotId],
        infos: Sequence[ChunkInfo],
        firsts: Sequence[int],
        out: Buffers,
    ) -> "Parts":
        """Return parts in disk order, whatever order they come in."""
        segments, indexes = locate_all(slots)
        numbers = np.array(firsts, np.int64)
        order = np.lexsort((numbers, indexes, segments))
        sorted_infos = [infos[i] for i in order.tolist()]
        return cls(segments[order], indexes[order], numbers[order], sorted_infos, out.some(order))

    @property
    def num_parts(self) -> int:
        """Parts."""
        return len(self.infos)

    @property
    def part_bytes(self) -> int:
        """Bytes of each."""
        return self.out.nbytes

    def run(self, start: int, stop: int) -> "Parts":
        """Return the parts from ``start`` to ``stop``."""
        which = slice(start, stop)
        return Parts(
            self.segments[which],
            self.indexes[which],
            self.firsts[which],
            self.infos[which],
            self.out.some(which),
        )

    def record_starts(self) -> Ints:
        """Return the first part of each record; those of a record follow each other."""
        is_new = (np.diff(self.segments) != 0) | (np.diff(self.indexes) != 0)
        return np.concatenate([[0], np.flatnonzero(is_new) + 1])

    def places(self) -> list[Place]:
        """Return segment and index of each part's record."""
        return list(zip(self.segments.tolist(), self.indexes.tolist(), strict=True))

    def each(self) -> Iterator[Part]:
        """Yield the parts one by one."""
        yield from map(Part, self.places(), self.infos, self.firsts.tolist(), self.out)
