"""Plan disk I/O: which records go together into one system call. Pure functions, no I/O."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

MAX_OP_BYTES = 4 << 20
"""More gains no bandwidth and keeps an urgent read waiting longer behind a write."""

MIN_SPLIT_BYTES = 1 << 20
"""Splitting further for parallelism costs more in system calls than it gains."""

MAX_OP_BUFFERS = 1024
"""``IOV_MAX`` on Linux: buffers one ``preadv`` or ``pwritev`` takes."""


MIN_SHARE = 4
"""Records. Handing fewer to another thread takes longer than reading them."""


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


def join_pieces(
    pieces: Iterable[tuple[int, memoryview]], spill: memoryview
) -> list[tuple[int, list[memoryview]]]:
    """Join pieces of a file into few vectored reads, by reading what lies between them as well.

    Parameters
    ----------
    pieces : iterable of (offset, buffer)
        Where in the file, and where to; in the order in which they lie there. One that starts
        before the end of the last one begins a new read.
    spill : memoryview
        Where the bytes between two pieces go, if it is large enough for them.

    Returns
    -------
    list of (offset, buffers)
        At most twice as many buffers as pieces.
    """
    reads: list[tuple[int, list[memoryview]]] = []
    end = 0
    for offset, buffer in pieces:
        gap = offset - end
        if not reads or not 0 <= gap <= len(spill):
            reads.append((offset, [buffer]))
        else:
            reads[-1][1].extend([spill[:gap], buffer] if gap else [buffer])
        end = offset + len(buffer)
    return reads
