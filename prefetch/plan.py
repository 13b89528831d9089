"""Which chunks of a layer are attended where they are, and which stream through staging. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from offload.types import ChunkId, SlotId

_TIER_PLACES = 1 << 40
"""More than any tier has slots."""


def place_of(level: int, slot: SlotId) -> int:
    """Return one number for a slot of a tier; slots of a tier are next to each other."""
    return level * _TIER_PLACES + slot


def slot_at(place: int) -> tuple[int, SlotId]:
    """Return the level and slot of a place."""
    level, slot = divmod(place, _TIER_PLACES)
    return level, SlotId(slot)


@dataclass(frozen=True, slots=True)
class ResidentRun:
    """Chunks attended in place: a regular grid of slots of one tier.

    Attributes
    ----------
    start, count : int
        Positions in the sequence, in chunks.
    base : int
        Place of the first row's first chunk.
    strides : tuple of int
        Places between neighbouring rows, and between neighbouring positions.
    """

    start: int
    count: int
    base: int
    strides: tuple[int, int]


@dataclass(frozen=True, slots=True)
class LoadGroup:
    """Chunks that pass through one staging buffer together.

    Attributes
    ----------
    start, count : int
        Positions in the sequence, in chunks.
    chunks : tuple of ChunkId
        Position by position, then row by row. A chunk that rows share appears once for each.
    """

    start: int
    count: int
    chunks: tuple[ChunkId, ...]


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """How one layer's past is read: runs in place, groups through staging, in order."""

    runs: tuple[ResidentRun, ...]
    groups: tuple[LoadGroup, ...]


def plan_layer(
    rows: Sequence[Sequence[ChunkId]],
    places: Sequence[Sequence[int | None]],
    max_group_chunks: int,
    first: int = 0,
) -> LayerPlan:
    """Split the past of one layer into runs and groups.

    Parameters
    ----------
    rows : sequence of sequence of ChunkId
        For each row of the batch, its chunks in order; all rows are equally long.
    places : same shape
        See ``place_of``: where compute can read each chunk, or None where it has to be loaded.
    max_group_chunks : int
        Chunks that fit in one staging buffer, at least the batch size.
    first : int
        Position to start from; earlier ones are hidden by a sliding window.
    """
    batch, total = len(rows), len(rows[0]) if rows else 0
    per_group = max(1, max_group_chunks // max(1, batch))
    runs: list[ResidentRun] = []
    groups: list[LoadGroup] = []
    position = first
    while position < total:
        column = [slots[position] for slots in places]
        if None in column:
            stop = position + 1
            while stop < min(total, position + per_group) and None in (
                slots[stop] for slots in places
            ):
                stop += 1
            chunks = tuple(row[i] for i in range(position, stop) for row in rows)
            groups.append(LoadGroup(position, stop - position, chunks))
        else:
            run = _longest_run(places, position, total)
            if run is None:
                chunks = tuple(row[position] for row in rows)
                groups.append(LoadGroup(position, 1, chunks))
                stop = position + 1
            else:
                runs.append(run)
                stop = position + run.count
        position = stop
    return LayerPlan(tuple(runs), tuple(groups))


def _longest_run(
    places: Sequence[Sequence[int | None]], start: int, total: int
) -> ResidentRun | None:
    """Return the longest regular grid that starts here, or None if not even one position is one."""
    column = [slots[start] for slots in places]
    base = column[0]
    assert base is not None
    row_stride = (column[1] or 0) - base if len(column) > 1 else 0
    is_regular = all(slot == base + i * row_stride for i, slot in enumerate(column))
    if not 0 <= row_stride < _TIER_PLACES // 2 or not is_regular:
        return None
    count, step = 1, 0
    while start + count < total:
        column = [slots[start + count] for slots in places]
        if column[0] is None:
            break
        if count == 1:
            step = column[0] - base
        expected = base + count * step
        is_regular = all(slot == expected + i * row_stride for i, slot in enumerate(column))
        if not 0 < step < _TIER_PLACES // 2 or not is_regular:
            break
        count += 1
    return ResidentRun(start, count, base, (row_stride, step if count > 1 else 0))
