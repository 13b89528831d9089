"""The record format: how one chunk lies on disk. Pure functions, no I/O.

A record is one header page and the chunk's bytes, padded to whole pages. The header names the chunk
and carries one checksum per KV head, so that one head can be read and verified without the others,
and one over itself. ``docs/file-format.md`` has the byte offsets.
"""

import struct
from dataclasses import dataclass, field

import torch
import xxhash

from offload.errors import ConfigError, CorruptChunk
from offload.types import PAGE_BYTES, ChunkInfo, ChunkLayout

MAGIC = b"KVRECORD"
FORMAT_VERSION = 1
CODEC_RAW = 0
FINGERPRINT_BYTES = 16

_FIELDS = struct.Struct("<8sHBBIIIIIQQ16sQI")
_FIELD_NAMES = (
    "magic",
    "format version",
    "codec",
    "dtype code",
    "num_kv_heads",
    "chunk_tokens",
    "key_dim",
    "value_dim",
    "layer",
    "first_token",
    "chunk_id",
    "model fingerprint",
    "payload bytes",
    "number of checksums",
)
_DIGEST = struct.Struct("<Q")
_DIGESTS_OFFSET = 80
_SELF_OFFSET = PAGE_BYTES - _DIGEST.size

MAX_HEADS = (_SELF_OFFSET - _DIGESTS_OFFSET) // _DIGEST.size
"""KV heads whose checksums fit into the header page."""

_DTYPE_CODES = {
    torch.float32: 1,
    torch.float16: 2,
    torch.bfloat16: 3,
    torch.float64: 4,
    torch.float8_e4m3fn: 5,
    torch.float8_e5m2: 6,
    torch.int8: 7,
    torch.uint8: 8,
}


@dataclass(frozen=True)
class RecordFormat:
    """What all records of one tier have in common.

    Parameters
    ----------
    layout : ChunkLayout
    fingerprint : bytes
        Identity of the model, at most 16 bytes; shorter ones are padded with zeros.

    Attributes
    ----------
    head_bytes : int
        Payload bytes of one KV head.
    payload_bytes : int
        Payload bytes of all of them, without padding.
    record_bytes : int
        The header page and a slot.

    Raises
    ------
    ConfigError
        More KV heads than the header has room for, a dtype without a code, or a fingerprint that
        is too long.
    """

    layout: ChunkLayout
    fingerprint: bytes = b""
    # Kept, because every record that is read needs them.
    head_bytes: int = field(init=False)
    payload_bytes: int = field(init=False)
    record_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        layout = self.layout
        if layout.num_kv_heads > MAX_HEADS:
            raise ConfigError(
                f"a record holds at most {MAX_HEADS} KV heads, not {layout.num_kv_heads}"
            )
        if layout.dtype not in _DTYPE_CODES:
            raise ConfigError(f"chunks of dtype {layout.dtype} cannot be stored on disk")
        if len(self.fingerprint) > FINGERPRINT_BYTES:
            raise ConfigError(
                f"a model fingerprint has at most {FINGERPRINT_BYTES} bytes, "
                f"not {len(self.fingerprint)}"
            )
        object.__setattr__(self, "head_bytes", layout.chunk_bytes // layout.num_kv_heads)
        object.__setattr__(self, "payload_bytes", layout.chunk_bytes)
        object.__setattr__(self, "record_bytes", PAGE_BYTES + layout.slot_bytes)


def digest_heads(payload: memoryview, head_bytes: int) -> tuple[int, ...]:
    """Return the xxh3_64 of each KV head.

    Parameters
    ----------
    payload : memoryview
        Bytes of one or more whole heads.
    head_bytes : int
    """
    digest = xxhash.xxh3_64_intdigest
    starts = range(0, len(payload), head_bytes)
    return tuple([digest(payload[start : start + head_bytes]) for start in starts])


def pack_header(fmt: RecordFormat, info: ChunkInfo, digests: tuple[int, ...]) -> bytes:
    """Return the header page of a record.

    Parameters
    ----------
    fmt : RecordFormat
    info : ChunkInfo
    digests : tuple of int
        One per KV head, from ``digest_heads``.

    Returns
    -------
    bytes
        ``PAGE_BYTES`` of them.
    """
    page = bytearray(PAGE_BYTES)
    _FIELDS.pack_into(page, 0, *_fields(fmt, info))
    struct.pack_into(f"<{len(digests)}Q", page, _DIGESTS_OFFSET, *digests)
    own = xxhash.xxh3_64_intdigest(memoryview(page)[:_SELF_OFFSET])
    _DIGEST.pack_into(page, _SELF_OFFSET, own)
    return bytes(page)


def parse_header(header: memoryview) -> tuple[RecordFormat, ChunkInfo, tuple[int, ...]]:
    """Return what a header page says of itself, for a reader that does not know what to expect.

    Returns
    -------
    fmt : RecordFormat
    info : ChunkInfo
    digests : tuple of int
        Checksums of the KV heads.

    Raises
    ------
    CorruptChunk
        The page is damaged, or of a version, codec or dtype that this code does not know.
    """
    unknown = ChunkInfo(0, 0, 0)
    found = _FIELDS.unpack_from(_check_page(header, unknown))
    magic, version, codec, dtype, heads, tokens, key_dim, value_dim = found[:8]
    layer, first_token, chunk_id, fingerprint, payload_bytes, num_digests = found[8:]
    dtypes = {code: name for name, code in _DTYPE_CODES.items()}
    if (magic, version, codec) != (MAGIC, FORMAT_VERSION, CODEC_RAW) or dtype not in dtypes:
        raise CorruptChunk(
            f"a record with magic {magic!r}, version {version}, codec {codec}, dtype {dtype}; "
            f"this code reads {MAGIC!r}, version {FORMAT_VERSION}, codec {CODEC_RAW}"
        )
    if num_digests != heads or not 0 < heads <= MAX_HEADS or not tokens:
        raise CorruptChunk(f"a record of {heads} KV heads with {num_digests} checksums")
    fmt = RecordFormat(ChunkLayout(heads, tokens, key_dim, value_dim, dtypes[dtype]), fingerprint)
    if payload_bytes != fmt.payload_bytes:
        raise CorruptChunk(f"a record of {payload_bytes} bytes for {fmt.layout}")
    digests = struct.unpack_from(f"<{heads}Q", header, _DIGESTS_OFFSET)
    return fmt, ChunkInfo(chunk_id, layer, first_token), digests


def check_header(header: memoryview, fmt: RecordFormat, info: ChunkInfo) -> tuple[int, ...]:
    """Verify a header page and return the checksums of the KV heads.

    Raises
    ------
    CorruptChunk
        The page is damaged, or describes another chunk, model or format.
    """
    found = _FIELDS.unpack_from(_check_page(header, info))
    expected = _fields(fmt, info)
    if found != expected:
        name, want, got = next(
            field
            for field in zip(_FIELD_NAMES, expected, found, strict=True)
            if field[1] != field[2]
        )
        raise CorruptChunk(f"{_name(info)}: {name} should be {want!r}, the record has {got!r}")
    return struct.unpack_from(f"<{fmt.layout.num_kv_heads}Q", header, _DIGESTS_OFFSET)


def check_heads(
    payload: memoryview,
    fmt: RecordFormat,
    info: ChunkInfo,
    digests: tuple[int, ...],
    first: int = 0,
) -> None:
    """Verify whole KV heads against the checksums of their record.

    Parameters
    ----------
    payload : memoryview
        Bytes of one or more whole heads, without padding.
    fmt, info
        As in ``check_header``; they name the chunk in the message.
    digests : tuple of int
        All checksums of the record, from ``check_header``.
    first : int
        The head that ``payload`` starts with.

    Raises
    ------
    CorruptChunk
        A head is not what was written.
    """
    found = digest_heads(payload, fmt.head_bytes)
    expected = digests[first : first + len(found)]
    if found == expected:
        return
    bad = [
        first + i for i, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1]
    ]
    raise CorruptChunk(
        f"{_name(info)}: the checksum of {len(bad)} of {len(found)} KV heads is wrong, "
        f"first of head {bad[0]}: {found[bad[0] - first]:016x}, "
        f"the record says {digests[bad[0]]:016x}"
    )


def verify(header: memoryview, payload: memoryview, fmt: RecordFormat, info: ChunkInfo) -> None:
    """Verify a whole record.

    Parameters
    ----------
    header : memoryview
        The header page.
    payload : memoryview
        ``slot_bytes`` bytes; the padding after the chunk means nothing and is not looked at.

    Raises
    ------
    CorruptChunk
        The record is not what was written for ``info``.
    """
    digests = check_header(header, fmt, info)
    check_heads(payload[: fmt.payload_bytes], fmt, info, digests)


def _check_page(header: memoryview, info: ChunkInfo) -> memoryview:
    """Return the header page if its own checksum is right."""
    if len(header) != PAGE_BYTES:
        raise CorruptChunk(f"{_name(info)}: header has {len(header)} bytes, not {PAGE_BYTES}")
    [stored] = _DIGEST.unpack_from(header, _SELF_OFFSET)
    own = xxhash.xxh3_64_intdigest(header[:_SELF_OFFSET])
    if own != stored:
        raise CorruptChunk(
            f"{_name(info)}: header checksum is {own:016x}, the record says {stored:016x} "
            f"(magic {bytes(header[: len(MAGIC)])!r})"
        )
    return header


def _fields(fmt: RecordFormat, info: ChunkInfo) -> tuple[bytes | int, ...]:
    layout = fmt.layout
    return (
        MAGIC,
        FORMAT_VERSION,
        CODEC_RAW,
        _DTYPE_CODES[layout.dtype],
        layout.num_kv_heads,
        layout.chunk_tokens,
        layout.key_dim,
        layout.value_dim,
        info.layer,
        info.first_token,
        info.chunk_id,
        fmt.fingerprint.ljust(FINGERPRINT_BYTES, b"\0"),
        fmt.payload_bytes,
        layout.num_kv_heads,
    )


def _name(info: ChunkInfo) -> str:
    return f"chunk {info.chunk_id} (layer {info.layer}, token {info.first_token})"
