"""Records that are sealed: each unit by itself, so that one can be read without the others.

A unit keeps its length; salt and tags lie in the header page. Checksums are of the sealed bytes:
they tell nothing of the content, and are verified without the key.
"""

import secrets
from array import array
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import xxhash

from offload.errors import CorruptChunk
from offload.tiers.record import (
    RecordFormat,
    Seal,
    Stored,
    checksums_of,
    even_starts,
    name_of,
)
from offload.tiers.record_header import pack_fields
from offload.tiers.sealing import SALT_BYTES, TAG_BYTES
from offload.types import ChunkInfo, round_up

_PURPOSE = "record"


def raw_units(fmt: RecordFormat, info: ChunkInfo) -> Stored:
    """Return what is to be sealed of a chunk that is not encoded: all of it, in coarse units."""
    layout = fmt.layout
    num_units = layout.num_kv_heads * layout.chunk_tokens // fmt.coded_tokens
    starts = even_starts(num_units, fmt.payload_bytes // num_units)
    return Stored(info, 0, fmt.coded_tokens, array("Q"), starts, None)


def seal_record(
    fmt: RecordFormat, stored: Stored, payload: memoryview, where: bytes, room: memoryview
) -> tuple[Stored, memoryview]:
    """Seal the units of a record.

    Parameters
    ----------
    fmt : RecordFormat
        With a sealer.
    stored : Stored
        What is to be sealed; its checksums are not looked at.
    payload : memoryview
        The units; left as they are.
    where : bytes
        File and index: the record opens nowhere else.
    room : memoryview
        Of ``slot_bytes``, page-aligned; whatever is in it is overwritten as far as it is returned.

    Returns
    -------
    tuple of Stored and memoryview
        What the header is to say, and the sealed units in ``room``, padded to whole pages.
    """
    assert fmt.sealer is not None
    salt = secrets.token_bytes(SALT_BYTES)
    box, starts = fmt.sealer.box(_PURPOSE, salt), stored.starts
    context = _context(fmt, replace(stored, seal=Seal(salt, b"")), where)
    sealed = room[: round_up(starts[-1])]
    sealed[starts[-1] :] = bytes(len(sealed) - starts[-1])
    tags = []
    for number, (start, end) in enumerate(pairwise(starts)):
        unit = memoryview(box.seal(number, payload[start:end], context))
        sealed[start:end] = unit[:-TAG_BYTES]
        tags.append(unit[-TAG_BYTES:])
    checksums = array("Q", checksums_of(sealed[: starts[-1]], starts))
    whole = xxhash.xxh3_64_intdigest(sealed[: starts[-1]])
    seal = Seal(salt, b"".join(tags))
    return replace(stored, checksums=checksums, whole=whole, seal=seal), sealed


def open_units(
    fmt: RecordFormat, stored: Stored, units: Sequence[memoryview], first: int, where: bytes
) -> None:
    """Replace sealed units, whose checksums were verified, by what they were before.

    Parameters
    ----------
    fmt : RecordFormat
    stored : Stored
        Sealed.
    units : sequence of memoryview
        From unit ``first`` on.
    first : int
    where : bytes
        As for ``seal_record``.

    Raises
    ------
    CorruptChunk
        A unit was sealed with another key, for another chunk or place, or somebody has changed it.
    """
    assert fmt.sealer is not None
    assert stored.seal is not None
    box, context = fmt.sealer.box(_PURPOSE, stored.seal.salt), _context(fmt, stored, where)
    for number, unit in enumerate(units, first):
        tag = stored.seal.tags[number * TAG_BYTES : (number + 1) * TAG_BYTES]
        if not box.open_in_place(number, unit, tag, context):
            raise CorruptChunk(
                f"{name_of(stored.info)}: unit {number} of {len(stored.checksums)} is not what was "
                f"sealed for {where.decode()}, though its checksum is right"
            )


def _context(fmt: RecordFormat, stored: Stored, where: bytes) -> bytes:
    return pack_fields(fmt, stored) + where
