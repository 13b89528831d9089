"""Plan disk I/O: which records go together into one system call. Pure functions, no I/O."""

from collections.abc import Sequence
from dataclasses import dataclass

MAX_OP_BYTES = 4 << 20
"""More gains no bandwidth and keeps an urgent read waiting longer behind a write."""

MIN_SPLIT_BYTES = 1 << 20
"""Splitting further for parallelism costs more in system calls than it gains."""

MAX_OP_BUFFERS = 1024
"""``IOV_MAX`` on Linux: buffers one ``preadv`` or ``pwritev`` takes."""


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes in one segment, and how many buffers it scatters into.

    Attributes
    ----------
    segment : int
    offset, num_bytes : int
    num_buffers : int
    """

    segment: int
    offset: int
    num_bytes: int
    num_buffers: int

    @property
    def end(self) -> int:
        """Offset of the first byte behind it."""
        return self.offset + self.num_bytes


@dataclass(frozen=True, slots=True)
class Operation:
    """One system call: neighbouring extents of one segment, in disk order.

    Attributes
    ----------
    segment : int
    offset, num_bytes : int
    members : tuple of int
        Indexes of the requests it serves, in the order in which they lie on disk.
    """

    segment: int
    offset: int
    num_bytes: int
    members: tuple[int, ...]


def plan_io(
    extents: Sequence[Extent],
    num_threads: int,
    *,
    max_op_bytes: int = MAX_OP_BYTES,
    min_split_bytes: int = MIN_SPLIT_BYTES,
    max_op_buffers: int = MAX_OP_BUFFERS,
) -> list[Operation]:
    """Join neighbours on disk into few large operations, and still keep every thread busy.

    An extent is never split, so that one thread can verify all of it. Extents that repeat or
    overlap are each read on their own.

    Parameters
    ----------
    extents : sequence of Extent
    num_threads : int
        Operations stop growing once each thread has its share, but not before
        ``min_split_bytes``.
    max_op_bytes : int
        Of one operation of several extents; a larger extent gets an operation of its own.
    min_split_bytes : int
    max_op_buffers : int
        Of one operation.

    Returns
    -------
    list of Operation
        In disk order. Each index into ``extents`` is a member of exactly one.
    """
    total = sum(extent.num_bytes for extent in extents)
    share = -(-total // max(1, num_threads))
    target = min(max_op_bytes, max(min_split_bytes, share))
    order = sorted(range(len(extents)), key=lambda i: (extents[i].segment, extents[i].offset))
    groups: list[list[int]] = []
    num_bytes = num_buffers = 0
    for i in order:
        extent = extents[i]
        joins = (
            bool(groups)
            and _are_neighbours(extents[groups[-1][-1]], extent)
            and num_bytes < target
            and num_bytes + extent.num_bytes <= max_op_bytes
            and num_buffers + extent.num_buffers <= max_op_buffers
        )
        if joins:
            groups[-1].append(i)
        else:
            groups.append([i])
            num_bytes = num_buffers = 0
        num_bytes += extent.num_bytes
        num_buffers += extent.num_buffers
    return [_operation(extents, group) for group in groups]


def _are_neighbours(first: Extent, second: Extent) -> bool:
    return first.segment == second.segment and first.end == second.offset


def _operation(extents: Sequence[Extent], members: list[int]) -> Operation:
    first, last = extents[members[0]], extents[members[-1]]
    return Operation(first.segment, first.offset, last.end - first.offset, tuple(members))
