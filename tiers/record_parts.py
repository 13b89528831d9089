"""Read parts of records: runs of tokens of single KV heads, verifying little else."""

from collections.abc import Sequence

import numpy as np

from offload.errors import ConfigError
from offload.tiers.io_plan import MAX_OP_BUFFERS, MAX_OP_BYTES, share_out
from offload.tiers.record import RecordFormat, Stored, check_units
from offload.tiers.record_fill import Buffer, fill
from offload.tiers.record_header import check_header
from offload.tiers.record_io import Place, RecordIo
from offload.tiers.record_part import Part
from offload.tiers.record_runs import read_runs
from offload.types import PAGE_BYTES

_SPILL_BYTES = 8 * PAGE_BYTES
"""A gap of so many bytes is read as fast as it is skipped by another system call, for less CPU."""

_MAX_SHARE = MAX_OP_BUFFERS // 4
"""Parts whose headers and bytes, and the gaps between them, fit into one system call."""


def plan_parts(
    parts: Sequence[Part], num_bytes: int, num_threads: int, min_parts: int
) -> list[list[Part]]:
    """Divide parts of ``num_bytes`` each into jobs of one segment, in disk order."""
    most = max(1, min(_MAX_SHARE, MAX_OP_BYTES // (PAGE_BYTES + num_bytes)))
    where = [(part.place[0], (part.place[1], part.first)) for part in parts]
    jobs = share_out(where, num_threads, most, min_records=min_parts)
    return [[parts[i] for i in job] for job in jobs]


def read_parts(parts: Sequence[Part], io: RecordIo, scratch: memoryview) -> None:
    """Fill buffers with parts of the records of one segment.

    Parameters
    ----------
    parts : sequence of Part
        In disk order.
    io : RecordIo
    scratch : memoryview
        A page for each part, and ``_SPILL_BYTES``.

    Raises
    ------
    CorruptChunk
    StorageError
    """
    coarse: list[tuple[Part, Stored]] = []
    plain: list[tuple[Part, Stored | None]] = []
    for part in parts:
        stored = io.known(part.place, part.info)
        if stored is None or _is_plain(io.fmt, stored):
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


def _is_plain(fmt: RecordFormat, stored: Stored) -> bool:
    """Whether the units of a record are those that a format asks for."""
    is_raw = not stored.codec and stored.seal is None
    return is_raw and stored.unit_tokens == fmt.unit_tokens


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
        if _is_plain(fmt, known):
            check_units(part.out.bytes, fmt, known, part.first)
        else:
            coarse.append((part, known))
    if io.headers is not None:
        io.headers |= found
    return coarse
