"""Where the records of a disk tier lie: append-only segments. Bookkeeping only, no I/O."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offload.errors import CapacityError
from offload.types import SlotId

INDEX_BITS = 32
"""A slot is a segment's number, shifted by so many bits, plus the record's index in it."""


class Hole(NamedTuple):
    """A run of dead records inside a living segment."""

    segment: int
    first: int
    num_records: int


class Freed(NamedTuple):
    """What a ``free`` left behind: files to unlink, and holes to punch."""

    dead_segments: list[int]
    holes: list[Hole]


@dataclass(slots=True)
class _Segment:
    stream: int
    live: set[int] = field(default_factory=set)
    num_appended: int = 0
    num_dead: int = 0
    """Records that are dead but still take up space."""


class SegmentTable:
    """Which positions of which segments hold records.

    A slot is a position: the segment's number and the index in it, see ``INDEX_BITS``. Positions
    are handed out in order within a stream's open segment and never twice, so a stale slot can
    never name another chunk's record.

    Invariant: ``num_used`` counts every record whose space is not given back, and never exceeds
    ``num_slots``; numbers given to segments of others (``reserve_number``) count for nothing. Not
    thread-safe.

    Parameters
    ----------
    num_slots : int
        Records that may take up space at any time.
    records_per_segment : int
    """

    def __init__(self, num_slots: int, records_per_segment: int) -> None:
        self.num_slots = num_slots
        self.records_per_segment = records_per_segment
        self.num_used = 0
        self._segments: dict[int, _Segment] = {}
        self._open: dict[int, int] = {}
        self._next_segment = 0

    def allocate(self, n: int, stream: int) -> list[SlotId]:
        """Take the next ``n`` positions of a stream, or raise CapacityError and take none."""
        free = self.num_slots - self.num_used
        if n > free:
            raise CapacityError(f"{n} slots requested, {free} free of {self.num_slots}")
        self.num_used += n
        slots: list[SlotId] = []
        while len(slots) < n:
            number = self._open_segment(stream)
            segment = self._segments[number]
            first = segment.num_appended
            segment.num_appended = min(self.records_per_segment, first + n - len(slots))
            indexes = range(first, segment.num_appended)
            segment.live.update(indexes)
            slots += [slot_at(number, index) for index in indexes]
        return slots

    def reserve_number(self) -> int:
        """Return a segment number that will never be handed out, for a segment of somebody else."""
        number = self._next_segment
        self._next_segment += 1
        return number

    def holds(self, slot: SlotId) -> bool:
        """Return whether a slot was allocated and not freed."""
        number, index = locate(slot)
        return number in self._segments and index in self._segments[number].live

    def free(self, slots: Collection[SlotId]) -> Freed:
        """Declare records dead.

        The space of dead segments counts as given back; that of holes only after ``punched``.
        """
        touched: dict[int, list[int]] = {}
        for slot in sorted(slots):
            number, index = locate(slot)
            self._segments[number].live.remove(index)
            touched.setdefault(number, []).append(index)
        freed = Freed([], [])
        for number, indexes in touched.items():
            segment = self._segments[number]
            segment.num_dead += len(indexes)
            if segment.live:
                freed.holes.extend(Hole(number, *run) for run in _runs(indexes))
            else:
                self._forget(number)
                freed.dead_segments.append(number)
        return freed

    def punched(self, hole: Hole) -> None:
        """Count the space of a hole as given back."""
        self._segments[hole.segment].num_dead -= hole.num_records
        self.num_used -= hole.num_records

    def is_alive(self, segment: int) -> bool:
        """Return whether a segment has records that are not dead."""
        return segment in self._segments

    @property
    def segments(self) -> list[int]:
        """Numbers of the segments that are not dead."""
        return list(self._segments)

    def check_integrity(self) -> None:
        """Raise AssertionError if the counts are not those of the segments."""
        counted = sum(len(seg.live) + seg.num_dead for seg in self._segments.values())
        assert counted == self.num_used <= self.num_slots, (counted, self.num_used, self.num_slots)
        for stream, number in self._open.items():
            assert self._segments[number].stream == stream
        for segment in self._segments.values():
            assert segment.live
            assert max(segment.live) < segment.num_appended <= self.records_per_segment

    def _open_segment(self, stream: int) -> int:
        number = self._open.get(stream)
        if number is None or self._segments[number].num_appended == self.records_per_segment:
            number = self.reserve_number()
            self._segments[number] = _Segment(stream)
            self._open[stream] = number
        return number

    def _forget(self, number: int) -> None:
        segment = self._segments.pop(number)
        self.num_used -= segment.num_dead
        if self._open.get(segment.stream) == number:
            del self._open[segment.stream]


def slot_at(segment: int, index: int) -> SlotId:
    """Return the slot of a record."""
    return SlotId(segment << INDEX_BITS | index)


def locate(slot: SlotId) -> tuple[int, int]:
    """Return the segment and the index in it of a slot, alive or not."""
    return slot >> INDEX_BITS, slot & (1 << INDEX_BITS) - 1


def locate_all(slots: Sequence[SlotId]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the segments and indexes of many slots, ``int64 [len(slots)]`` each."""
    numbers = np.array(slots, np.int64)
    return numbers >> INDEX_BITS, numbers & (1 << INDEX_BITS) - 1


def _runs(indexes: list[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, count) of each run of consecutive numbers; ``indexes`` is sorted."""
    first = last = indexes[0]
    for index in indexes[1:]:
        if index != last + 1:
            yield first, last - first + 1
            first = index
        last = index
    yield first, last - first + 1
