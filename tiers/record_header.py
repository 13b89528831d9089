"""The header page of a record: packed and verified. Pure, no I/O."""

import struct
from array import array
from collections.abc import Callable
from itertools import accumulate

import xxhash

from offload.errors import ConfigError, CorruptChunk
from offload.tiers.record import (
    FINGERPRINT_BYTES,
    ITEM_BYTES,
    MAX_CODED_UNITS,
    MAX_SEALED_UNITS,
    MAX_UNITS,
    RecordFormat,
    Seal,
    Stored,
    check_payload,
    even_starts,
    name_of,
)
from offload.tiers.sealing import SALT_BYTES, TAG_BYTES
from offload.types import PAGE_BYTES, ChunkInfo, round_up

MAGIC = b"KVRECORD"
FORMAT_VERSION = 2
"""Version 1 had one checksum per KV head, and no codecs; it is still read."""
SEALED_VERSION = 3
"""Of records that are sealed; others are written in version 2."""

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
_LENGTH_BYTES = 4
_MOST_SLOT_BYTES = 1 << 32
_SELF_OFFSET = PAGE_BYTES - _CHECKSUM.size
_WHOLE_OFFSET = _SELF_OFFSET - _CHECKSUM.size


def pack_header(fmt: RecordFormat, stored: Stored) -> bytes:
    """Return the header page of a record, ``PAGE_BYTES`` of them."""
    num_units = len(stored.checksums)
    page = bytearray(PAGE_BYTES)
    page[: _FIELDS.size] = pack_fields(fmt, stored)
    struct.pack_into(f"<{num_units}Q", page, _CHECKSUMS_OFFSET, *stored.checksums)
    if stored.codec:
        lengths = [
            end - start for start, end in zip(stored.starts, stored.starts[1:], strict=False)
        ]
        offset = _CHECKSUMS_OFFSET + num_units * _CHECKSUM.size
        struct.pack_into(f"<{num_units}I", page, offset, *lengths)
    if stored.seal is not None:
        offset = _seal_offset(num_units, stored.codec)
        content = stored.seal.salt + stored.seal.tags
        page[offset : offset + len(content)] = content
    assert stored.whole is not None
    _CHECKSUM.pack_into(page, _WHOLE_OFFSET, stored.whole)
    own = xxhash.xxh3_64_intdigest(memoryview(page)[:_SELF_OFFSET])
    _CHECKSUM.pack_into(page, _SELF_OFFSET, own)
    return bytes(page)


def pack_fields(fmt: RecordFormat, stored: Stored) -> bytes:
    """Return the beginning of a header page: all that it says but checksums, lengths and seal."""
    return _FIELDS.pack(
        MAGIC,
        FORMAT_VERSION if stored.seal is None else SEALED_VERSION,
        stored.codec,
        *_common(fmt, stored.info),
        stored.payload_bytes,
        len(stored.starts) - 1,
        stored.unit_tokens,
    )


def check_header(header: memoryview, fmt: RecordFormat, info: ChunkInfo) -> Stored:
    """Verify a header page and return what it says of the payload.

    Raises
    ------
    CorruptChunk
        The page is damaged, or describes another chunk, model or format; or it is not that of a
        sealed record, as all that ``fmt`` describes are.
    ConfigError
        The record is sealed, and ``fmt`` has no key.
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


def check_structure(page: bytes, read: Callable[[int], bytes], what: str) -> int:
    """Verify the checksums of any record, whatever it holds; return the bytes that it takes up.

    Parameters
    ----------
    page : bytes
        The header page.
    read : callable
        Returns so many of the bytes that follow.
    what : str
        Names the record in an error.

    Raises
    ------
    CorruptChunk
        It is damaged, or none.
    """
    found = _FIELDS.unpack_from(_check_page(memoryview(page), what))
    magic, version, *_ = found
    heads, tokens, key_dim, value_dim = (int(number) for number in found[4:8])
    payload_bytes, itemsize = int(found[12]), ITEM_BYTES.get(int(found[3]), 0)
    slot_bytes = round_up(heads * tokens * (key_dim + value_dim) * itemsize)
    is_known = magic == MAGIC and version in (FORMAT_VERSION, SEALED_VERSION)
    if not is_known or not payload_bytes <= slot_bytes <= _MOST_SLOT_BYTES:
        raise CorruptChunk(
            f"{what}: magic {magic!r}, format version {version!r}, {payload_bytes} of {slot_bytes} "
            "bytes are no record"
        )
    payload = memoryview(read(slot_bytes))[:payload_bytes]
    [whole] = _CHECKSUM.unpack_from(page, _WHOLE_OFFSET)
    own = xxhash.xxh3_64_intdigest(payload)
    if len(payload) < payload_bytes or own != whole:
        raise CorruptChunk(
            f"{what}: the checksum of {len(payload)} of {payload_bytes} bytes is {own:016x}, the "
            f"record says {whole:016x}"
        )
    return PAGE_BYTES + slot_bytes


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
    known = (1, FORMAT_VERSION, SEALED_VERSION)
    if magic != MAGIC or version not in known or (version == 1 and codec):
        raise CorruptChunk(
            f"{name_of(info)}: magic {magic!r}, format version {version!r}, codec {codec!r}; this "
            f"code reads {MAGIC!r}, format versions 1, without codecs, {FORMAT_VERSION} and "
            f"{SEALED_VERSION}"
        )
    is_sealed = version == SEALED_VERSION
    if is_sealed and fmt.sealer is None:
        raise ConfigError(f"{name_of(info)} is encrypted; it takes the key to read it")
    if fmt.sealer is not None and not is_sealed:
        raise CorruptChunk(f"{name_of(info)} is not sealed, where every record is")
    tokens = fmt.layout.chunk_tokens
    unit_tokens = tokens if version == 1 else unit_tokens
    most = MAX_SEALED_UNITS if is_sealed else MAX_CODED_UNITS if codec else MAX_UNITS
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
    seal = _read_seal(header, num_units, codec) if is_sealed else None
    return Stored(info, codec, unit_tokens, checksums, starts, whole, seal)


def _read_seal(header: memoryview, num_units: int, codec: int) -> Seal:
    content = bytes(header[_seal_offset(num_units, codec) :])
    return Seal(content[:SALT_BYTES], content[SALT_BYTES:][: num_units * TAG_BYTES])


def _seal_offset(num_units: int, codec: int) -> int:
    """Return where in the page the salt is, and behind it the tags."""
    each = _CHECKSUM.size + (_LENGTH_BYTES if codec else 0)
    return _CHECKSUMS_OFFSET + num_units * each


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
