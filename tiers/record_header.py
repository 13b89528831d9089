"""The header page of a record: packed and verified. Pure, no I/O."""

import struct
from array import array
from itertools import accumulate

import xxhash

from offload.errors import CorruptChunk
from offload.tiers.record import (
    FINGERPRINT_BYTES,
    MAX_CODED_UNITS,
    MAX_UNITS,
    RecordFormat,
    Stored,
    check_payload,
    even_starts,
    name_of,
)
from offload.types import PAGE_BYTES, ChunkInfo

MAGIC = b"KVRECORD"
FORMAT_VERSION = 2
"""Version 1 had one checksum per KV head, and no codecs; it is still read."""

_FIELDS = struct.Struct("<8sHBBIIIIIQQ16sQII")
_COMMON = (
    "dtype code",
    "num_kv_heads",
    "chunk_tokens",
    "key_dim",
    "value_dim",
    "layer",
    "first_token",
    "chunk_id",
    "model fingerprint",
)
"""Fields 3 to 11, which a reader knows before it reads."""
_CHECKSUM = struct.Struct("<Q")
_CHECKSUMS_OFFSET = _FIELDS.size
_SELF_OFFSET = PAGE_BYTES - _CHECKSUM.size
_WHOLE_OFFSET = _SELF_OFFSET - _CHECKSUM.size


def pack_header(fmt: RecordFormat, stored: Stored) -> bytes:
    """Return the header page of a record, ``PAGE_BYTES`` of them."""
    num_units = len(stored.checksums)
    page = bytearray(PAGE_BYTES)
    _FIELDS.pack_into(
        page,
        0,
        MAGIC,
        FORMAT_VERSION,
        stored.codec,
        *_common(fmt, stored.info),
        stored.payload_bytes,
        num_units,
        stored.unit_tokens,
    )
    struct.pack_into(f"<{num_units}Q", page, _CHECKSUMS_OFFSET, *stored.checksums)
    if stored.codec:
        lengths = [
            end - start for start, end in zip(stored.starts, stored.starts[1:], strict=False)
        ]
        offset = _CHECKSUMS_OFFSET + num_units * _CHECKSUM.size
        struct.pack_into(f"<{num_units}I", page, offset, *lengths)
    assert stored.whole is not None
    _CHECKSUM.pack_into(page, _WHOLE_OFFSET, stored.whole)
    own = xxhash.xxh3_64_intdigest(memoryview(page)[:_SELF_OFFSET])
    _CHECKSUM.pack_into(page, _SELF_OFFSET, own)
    return bytes(page)


def check_header(header: memoryview, fmt: RecordFormat, info: ChunkInfo) -> Stored:
    """Verify a header page and return what it says of the payload.

    Raises
    ------
    CorruptChunk
        The page is damaged, or describes another chunk, model or format.
    """
    found = _FIELDS.unpack_from(_check_page(header, name_of(info)))
    expected = _common(fmt, info)
    if found[3:12] != expected:
        name, want, got = next(
            each for each in zip(_COMMON, expected, found[3:12], strict=True) if each[1] != each[2]
        )
        raise CorruptChunk(f"{name_of(info)}: {name} should be {want!r}, the record has {got!r}")
    return _stored(header, found, fmt, info)


def read_info(header: memoryview, fmt: RecordFormat) -> ChunkInfo:
    """Return which chunk a header page of this format is of.

    Raises
    ------
    CorruptChunk
        The page is no header, is damaged, or is of another model or format.
    """
    found = _FIELDS.unpack_from(_check_page(header, "unknown chunk"))
    layer, first_token, chunk_id = found[8:11]
    info = ChunkInfo(chunk_id, layer, first_token)
    check_header(header, fmt, info)
    return info


def verify(header: memoryview, payload: memoryview, fmt: RecordFormat, info: ChunkInfo) -> Stored:
    """Verify a whole record.

    Parameters
    ----------
    header : memoryview
        The header page.
    payload : memoryview
        ``slot_bytes`` bytes; what comes after the units means nothing and is not looked at.

    Raises
    ------
    CorruptChunk
        The record is not what was written for ``info``.
    """
    stored = check_header(header, fmt, info)
    check_payload(payload[: stored.payload_bytes], fmt, stored)
    return stored


def _check_page(header: memoryview, what: str) -> memoryview:
    """Return the header page if its own checksum is right."""
    if len(header) != PAGE_BYTES:
        raise CorruptChunk(f"{what}: header has {len(header)} bytes, not {PAGE_BYTES}")
    [stored] = _CHECKSUM.unpack_from(header, _SELF_OFFSET)
    own = xxhash.xxh3_64_intdigest(header[:_SELF_OFFSET])
    if own != stored:
        raise CorruptChunk(
            f"{what}: header checksum is {own:016x}, the record says {stored:016x} "
            f"(magic {bytes(header[: len(MAGIC)])!r})"
        )
    return header


def _stored(
    header: memoryview, found: tuple[bytes | int, ...], fmt: RecordFormat, info: ChunkInfo
) -> Stored:
    """Return what the fields of a sound header say of the payload, if that is possible."""
    magic, version, codec = found[:3]
    payload_bytes, num_units, unit_tokens = (int(number) for number in found[12:])
    if magic != MAGIC or version not in (1, FORMAT_VERSION) or (version == 1 and codec):
        raise CorruptChunk(
            f"{name_of(info)}: magic {magic!r}, format version {version!r}, codec {codec!r}; this "
            f"code reads {MAGIC!r}, format versions 1, without codecs, and {FORMAT_VERSION}"
        )
    tokens = fmt.layout.chunk_tokens
    unit_tokens = tokens if version == 1 else unit_tokens
    most = MAX_CODED_UNITS if codec else MAX_UNITS
    fits = num_units <= most and num_units * unit_tokens == fmt.layout.num_kv_heads * tokens
    if not fits or not unit_tokens or tokens % unit_tokens:
        raise CorruptChunk(f"{name_of(info)}: {num_units} units of {unit_tokens} tokens")
    checksums = array("Q")
    checksums.frombytes(header[_CHECKSUMS_OFFSET:][: num_units * _CHECKSUM.size])
    starts = even_starts(num_units, fmt.head_bytes * unit_tokens // tokens)
    if codec:
        offset = _CHECKSUMS_OFFSET + num_units * _CHECKSUM.size
        lengths = struct.unpack_from(f"<{num_units}I", header, offset)
        starts = array("I", accumulate(lengths, initial=0))
    if payload_bytes != starts[-1] or payload_bytes > fmt.payload_bytes:
        raise CorruptChunk(
            f"{name_of(info)}: payload of {payload_bytes} bytes in units of {starts[-1]}, "
            f"at most {fmt.payload_bytes}"
        )
    assert isinstance(codec, int)
    [whole] = (None,) if version == 1 else _CHECKSUM.unpack_from(header, _WHOLE_OFFSET)
    return Stored(info, codec, unit_tokens, checksums, starts, whole)


def _common(fmt: RecordFormat, info: ChunkInfo) -> tuple[bytes | int, ...]:
    layout = fmt.layout
    return (
        fmt.dtype_code,
        layout.num_kv_heads,
        layout.chunk_tokens,
        layout.key_dim,
        layout.value_dim,
        info.layer,
        info.first_token,
        info.chunk_id,
        fmt.fingerprint.ljust(FINGERPRINT_BYTES, b"\0"),
    )
