"""Plan disk I/O: which records go together into one system call. Pure functions, no I/O."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

MAX_OP_BYTES = 4 << 20
"""More gains no bandwidth and keeps an urgent read waiting longer behind a write."""

MIN_SPLIT_BYTES = 1 << 20
"""Splitting further for parallelism costs more in system calls than it gains."""

MAX_OP_BUFFERS = 1024
"""``IOV_MAX`` on Linux: buffers one ``preadv`` or ``pwritev`` takes."""


class Extent(NamedTuple):
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
    ops: list[Operation] = []
    members: list[int] = []
    segment = start = end = num_buffers = 0
    for i in sorted(range(len(extents)), key=extents.__getitem__):
        extent = extents[i]
        joins = (
            members
            and (extent.segment, extent.offset) == (segment, end)
            and end - start < target
            and end - start + extent.num_bytes <= max_op_bytes
            and num_buffers + extent.num_buffers <= max_op_buffers
        )
        if not joins:
            if members:
                ops.append(Operation(segment, start, end - start, tuple(members)))
            segment, start, members, num_buffers = extent.segment, extent.offset, [], 0
        members.append(i)
        end = extent.offset + extent.num_bytes
        num_buffers += extent.num_buffers
    if members:
        ops.append(Operation(segment, start, end - start, tuple(members)))
    return ops
