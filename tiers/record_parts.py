"""Read parts of records: runs of tokens of single KV heads, verifying little else."""

import os
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from offload.errors import ConfigError
from offload.tiers.aio import thread_queue
from offload.tiers.io_plan import MAX_OP_BUFFERS, MAX_OP_BYTES, join_pieces, share_out
from offload.tiers.pool import page_aligned
from offload.tiers.record import RecordFormat, Stored, check_units
from offload.tiers.record_codec import decode_units
from offload.tiers.record_header import check_header
from offload.tiers.record_io import Place, RecordIo, view
from offload.tiers.syscalls import read_fully
from offload.types import PAGE_BYTES, ChunkInfo, round_up

_SPILL_BYTES = 8 * PAGE_BYTES
"""A gap of so many bytes is read as fast as it is skipped by another system call, for less CPU."""

_MAX_SHARE = MAX_OP_BUFFERS // 4
"""Parts whose headers and bytes, and the gaps between them, fit into one system call."""


class Buffer(NamedTuple):
    """Host memory that a part is read into.

    Attributes
    ----------
    address : int
    bytes : memoryview
        Contiguous.
    """

    address: int
    bytes: memoryview

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return len(self.bytes)

    @classmethod
    def of(cls, tensor: Tensor) -> "Buffer":
        """Return the memory of a contiguous ``uint8`` tensor, which must outlive it."""
        return cls(tensor.data_ptr(), view(tensor))


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
        _read_coarse(io, coarse)


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
    return not stored.codec and stored.unit_tokens == fmt.unit_tokens


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
            page = Buffer(spare.address + at, scratch[at : at + PAGE_BYTES])
            headers[part.place] = page.bytes
            pieces.append((start, page))
        pieces.append((start + PAGE_BYTES + part.first * fmt.unit_bytes, part.out))
    _fill(io, parts[0][0].place[0], pieces, spill)
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


def _fill(
    io: RecordIo, segment: int, pieces: Sequence[tuple[int, Buffer]], spill: memoryview
) -> None:
    """Read pieces of a file, each at its offset, all at once if the kernel does that."""
    addresses = np.array([buffer.address for _, buffer in pieces], np.int64)
    is_aligned = io.fmt.unit_bytes % PAGE_BYTES == 0 and not (addresses % PAGE_BYTES).any()

    def move(fd: int, file: str) -> None:
        queue = thread_queue() if is_aligned and io.is_direct else None
        if queue is not None and io.preadv is os.preadv:
            offsets = np.array([offset for offset, _ in pieces], np.int64)
            sizes = np.array([len(buffer.bytes) for _, buffer in pieces], np.int64)
            if queue.read(fd, offsets, addresses, sizes):
                return
        for offset, buffers in join_pieces([(at, buffer.bytes) for at, buffer in pieces], spill):
            read_fully(fd, buffers, offset, file, io.preadv)

    io.on_file(segment, move, writing=False, is_aligned=is_aligned)


def _read_coarse(io: RecordIo, parts: Sequence[tuple[Part, Stored]]) -> None:
    """Read the units that parts lie in, decode them, and copy what is wanted; each run once."""
    fmt = io.fmt
    row_bytes = fmt.unit_bytes // fmt.unit_tokens
    wanted: dict[tuple[Place, int, int], list[tuple[Part, int]]] = {}
    stored_at = {}
    for part, stored in parts:
        first_token = part.first * fmt.unit_tokens
        end_token = first_token + len(part.out.bytes) // row_bytes
        first, end = first_token // stored.unit_tokens, -(-end_token // stored.unit_tokens)
        skipped = (first_token - first * stored.unit_tokens) * row_bytes
        wanted.setdefault((part.place, first, end), []).append((part, skipped))
        stored_at[part.place] = stored
    for (place, first, end), those in wanted.items():
        stored = stored_at[place]
        rows = page_aligned((end - first) * stored.unit_tokens * row_bytes)
        decode_units(fmt, stored, _read_units(io, place, stored, first, end), first, rows)
        decoded = view(rows)
        for part, skipped in those:
            part.out.bytes[:] = decoded[skipped : skipped + len(part.out.bytes)]


def _read_units(io: RecordIo, place: Place, stored: Stored, first: int, end: int) -> memoryview:
    """Return verified units of one record, as they are stored."""
    begin, stop = stored.starts[first], stored.starts[end]
    lead = begin % PAGE_BYTES
    memory = page_aligned(round_up(lead + stop - begin)).numpy().data
    offset = io.start_of(place) + PAGE_BYTES + begin - lead

    def move(fd: int, file: str) -> None:
        read_fully(fd, [memory], offset, file, io.preadv)

    io.on_file(place[0], move, writing=False, is_aligned=True)
    units = memory[lead : lead + stop - begin]
    check_units(units, io.fmt, stored, first)
    return units
