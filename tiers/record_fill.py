"""Read pieces of a segment file into host memory: all at once where the kernel does that."""

import os
from collections.abc import Sequence

import numpy as np

from offload.tiers.aio import thread_queue
from offload.tiers.buffers import Buffer
from offload.tiers.io_plan import join_pieces
from offload.tiers.record_io import RecordIo
from offload.tiers.syscalls import read_fully
from offload.types import PAGE_BYTES

NO_SPILL = memoryview(b"")


def fill(
    io: RecordIo, segment: int, pieces: Sequence[tuple[int, Buffer]], spill: memoryview
) -> None:
    """Read pieces of a segment.

    Parameters
    ----------
    io : RecordIo
    segment : int
    pieces : sequence of (offset, Buffer)
        Where in the file, and where to; in disk order.
    spill : memoryview
        For what lies between them, if they have to be read one call after the other.

    Raises
    ------
    CorruptChunk
        The file ends too early.
    StorageError
    """
    addresses = np.array([buffer.address for _, buffer in pieces], np.int64)
    sizes = np.array([buffer.nbytes for _, buffer in pieces], np.int64)
    is_aligned = not ((addresses | sizes) % PAGE_BYTES).any()

    def move(fd: int, file: str) -> None:
        queue = thread_queue() if is_aligned and io.is_direct else None
        if queue is not None and io.preadv is os.preadv:
            offsets = np.array([offset for offset, _ in pieces], np.int64)
            if queue.read(fd, offsets, addresses, sizes):
                return
        for offset, buffers in join_pieces([(at, buffer.bytes) for at, buffer in pieces], spill):
            read_fully(fd, buffers, offset, file, io.preadv)

    io.on_file(segment, move, writing=False, is_aligned=is_aligned)
    io.meter.add(int(sizes.sum()), len(pieces))
