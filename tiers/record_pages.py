"""Read parts of records that are stored as they are, all of a job together.

Sparse attention reads hundreds of single pages for each layer and row. One after the other they
take Python 20 µs each; as arrays a tenth of that, and the GIL is free while the disk works.
"""

import os

import numpy as np

from offload.kernels.xxh3 import checksums
from offload.tiers.aio import thread_queue
from offload.tiers.buffers import Ints
from offload.tiers.record import RecordFormat, Stored
from offload.tiers.record_io import RecordIo
from offload.tiers.record_part import Parts
from offload.types import PAGE_BYTES


def is_plain(fmt: RecordFormat, stored: Stored) -> bool:
    """Whether the units of a record are those that a format asks for."""
    is_raw = not stored.codec and stored.seal is None
    return is_raw and stored.unit_tokens == fmt.unit_tokens


def read_pages(parts: Parts, io: RecordIo) -> bool:
    """Fill buffers with parts of records of one segment, if everything is as it usually is.

    Usually is: headers are known and say that records are raw, buffers are page-aligned, the kernel
    reads asynchronously, and what was read is what was written. Otherwise reading the parts one by
    one does what there is to do, or says what is wrong.

    Returns
    -------
    bool
        Whether the buffers hold what was written.

    Raises
    ------
    StorageError
    """
    queue = thread_queue() if io.is_direct and io.preadv is os.preadv else None
    addresses = parts.out.addresses
    if queue is None or parts.part_bytes % PAGE_BYTES or (addresses % PAGE_BYTES).any():
        return False
    starts = parts.record_starts()
    records = _known(parts, starts, io)
    if records is None:
        return False
    offsets = parts.indexes * io.fmt.record_bytes + PAGE_BYTES
    offsets += parts.firsts * io.fmt.unit_bytes
    sizes = np.full(len(offsets), parts.part_bytes)
    is_read = False

    def move(fd: int, _: str) -> None:
        nonlocal is_read
        is_read = queue.read(fd, offsets, addresses, sizes)

    io.on_file(int(parts.segments[0]), move, writing=False, is_aligned=True)
    io.meter.add(len(offsets) * parts.part_bytes, len(offsets))
    return is_read and _are_as_written(parts, starts, records, addresses, io.fmt)


def _known(parts: Parts, starts: Ints, io: RecordIo) -> list[Stored] | None:
    """Return what the headers of the records said; None if that is not known of all, or unusual."""
    records = []
    for start in starts.tolist():
        place = int(parts.segments[start]), int(parts.indexes[start])
        stored = io.known(place, parts.infos[start])
        if stored is None or not is_plain(io.fmt, stored):
            return None
        records.append(stored)
    return records


def _are_as_written(
    parts: Parts, starts: Ints, records: list[Stored], addresses: Ints, fmt: RecordFormat
) -> bool:
    """Whether every unit has the checksum that the header of its record names."""
    units = np.arange(parts.part_bytes // fmt.unit_bytes)
    found = checksums((addresses[:, None] + units * fmt.unit_bytes).reshape(-1), fmt.unit_bytes)
    expected = np.frombuffer(b"".join([record.checksums for record in records]), np.uint64)
    expected = expected.reshape(len(records), -1)
    record = np.repeat(np.arange(len(records)), np.diff(starts, append=parts.num_parts))
    return np.array_equal(found, expected[record[:, None], parts.firsts[:, None] + units].ravel())
