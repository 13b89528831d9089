"""Read parts of records: runs of tokens of single KV heads, verifying little else."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from offload.errors import ConfigError
from offload.tiers.buffers import Buffer
from offload.tiers.io_plan import MAX_OP_BUFFERS, MAX_OP_BYTES
from offload.tiers.record import Stored, check_units
from offload.tiers.record_fill import fill
from offload.tiers.record_header import check_header
from offload.tiers.record_io import Place, RecordIo
from offload.tiers.record_pages import is_plain, read_pages
from offload.tiers.record_part import Part, Parts
from offload.tiers.record_runs import read_runs
from offload.types import PAGE_BYTES

_SPILL_BYTES = 8 * PAGE_BYTES
"""A gap of so many bytes is read as fast as it is skipped by another system call, for less CPU."""

_MAX_SHARE = MAX_OP_BUFFERS // 4
"""Parts whose headers and bytes, and the gaps between them, fit into one system call."""


def plan_parts(parts: Parts, num_threads: int, min_parts: int) -> list[Parts]:
    """Divide parts into jobs of one segment each."""
    if not parts.num_parts:
        return []
    most = max(1, min(_MAX_SHARE, MAX_OP_BYTES // (PAGE_BYTES + parts.part_bytes)))
    size = min(most, max(min_parts, -(-parts.num_parts // num_threads)))
    ends = [*(np.flatnonzero(np.diff(parts.segments)) + 1).tolist(), parts.num_parts]
    jobs = []
    for start, stop in pairwise([0, *ends]):
        jobs += [parts.run(first, min(first + size, stop)) for first in range(start, stop, size)]
    return jobs


def read_parts(parts: Parts, io: RecordIo, scratch: memoryview) -> None:
    """Fill buffers with parts of the records of one segment.

    Parameters
    ----------
    parts : Parts
    io : RecordIo
    scratch : memoryview
        A page for each part, and ``_SPILL_BYTES``.

    Raises
    ------
    CorruptChunk
    StorageError
    """
    if read_pages(parts, io):
        return
    coarse: list[tuple[Part, Stored]] = []
    plain: list[tuple[Part, Stored | None]] = []
    for part in parts.each():
        stored = io.known(part.place, part.info)
        if stored is None or is_plain(io.fmt, stored):
            plain.append((part, stored))
        else:
            coarse.append((part, stored))
    if plain:
        coarse += _read_plain(io, plain, scratch)
    if coarse:
        read_runs(io, coarse, scratch)


def first_parts(
    parts: slice | Sequence[int], num_parts: int, num_slots: int, total: int
) -> tuple[Sequence[int], int]:
    """Return the first part to read of each slot, and how many from there.

    Parameters
    ----------
    parts : slice or sequence of int
        Consecutive parts, the same of every slot; or the first one of each slot.
    num_parts : int
        Of each slot, if ``parts`` are the first ones.
    num_slots : int
    total : int
        Parts of a record.

    Raises
    ------
    ConfigError
        They are none, not consecutive, not as many as slots, or there are no such parts.
    """
    if isinstance(parts, slice):
        first, stop, step = parts.indices(total)
        if step != 1 or stop <= first:
            raise ConfigError(f"{parts} does not name consecutive parts of {total}")
        return [first] * num_slots, stop - first
    last = total - num_parts
    if num_parts < 1 or len(parts) != num_slots or not all(0 <= part <= last for part in parts):
        raise ConfigError(
            f"{parts} does not name {num_parts} of {total} parts for each of {num_slots} slots"
        )
    return parts, num_parts


def _read_plain(
    io: RecordIo, parts: Sequence[tuple[Part, Stored | None]], scratch: memoryview
) -> list[tuple[Part, Stored]]:
    """Read straight into the buffers; return the parts of which headers said it cannot be done."""
    fmt, spill = io.fmt, scratch[:_SPILL_BYTES]
    spare = Buffer(np.frombuffer(scratch, np.uint8).ctypes.data, scratch)
    headers: dict[Place, memoryview] = {}
    pieces: list[tuple[int, Buffer]] = []
    for part, stored in parts:
        start = io.start_of(part.place)
        if stored is None and part.place not in headers:
            at = _SPILL_BYTES + len(headers) * PAGE_BYTES
            page = spare.part(at, PAGE_BYTES)
            headers[part.place] = page.bytes
            pieces.append((start, page))
        if fmt.sealer is None:  # what is sealed has to be opened elsewhere
            pieces.append((start + PAGE_BYTES + part.first * fmt.unit_bytes, part.out))
    fill(io, parts[0][0].place[0], pieces, spill)
    found: dict[Place, Stored] = {}
    coarse = []
    for part, stored in parts:
        known = stored or found.get(part.place)
        if known is None:
            known = found[part.place] = check_header(headers[part.place], fmt, part.info)
        if is_plain(fmt, known):
            check_units(part.out.bytes, fmt, known, part.first)
        else:
            coarse.append((part, known))
    if io.headers is not None:
        io.headers |= found
    return coarse
