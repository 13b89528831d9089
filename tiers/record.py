"""What a record is: a chunk on disk, in units that are verified by themselves. Pure, no I/O.

A record is one header page (``record_header``) and the payload, padded to whole pages. The payload
is a sequence of units: runs of tokens of one KV head, head by head, each with a checksum, so that
one can be read and verified without the others. Raw units are the chunk's bytes, a page each where
rows allow it; encoded ones are what a codec made of them. ``docs/file-format.md`` has the offsets.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import xxhash

from offload.errors import ConfigError, CorruptChunk
from offload.tiers.codecs import Unit
from offload.tiers.sealing import Sealer
from offload.types import PAGE_BYTES, ChunkInfo, ChunkLayout

FINGERPRINT_BYTES = 16
MAX_UNITS = 500
"""Of a raw record: their checksums fill the header page."""
MAX_CODED_UNITS = 333
"""Of an encoded record: they have lengths, too."""
MAX_SEALED_UNITS = 141
"""Of a sealed record: they have tags, too."""

_CODED_TOKENS = 64
"""Tokens of an encoded unit, where a chunk is a multiple of that: few enough that reading a leaf of
an index decodes little else, and enough for the groups of the codecs."""

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
ITEM_BYTES = {code: dtype.itemsize for dtype, code in _DTYPE_CODES.items()}
"""Of an element, by the code of its dtype in a header."""

Starts = Sequence[int]


@dataclass(frozen=True)
class RecordFormat:
    """What all records of one tier have in common.

    Parameters
    ----------
    layout : ChunkLayout
    fingerprint : bytes
        Identity of the model, at most 16 bytes; shorter ones are padded with zeros.
    sealer : Sealer, optional
        Seals every record; one that is not sealed is corrupt then. Without it none is, and a sealed
        one cannot be read.

    Attributes
    ----------
    dtype_code : int
        Stands for the dtype in a header.
    head_bytes, unit_bytes : int
        Of one KV head, and of one unit of a raw record.
    unit_tokens, units_per_head : int
        Of a raw record.
    coded_tokens : int
        Tokens of a unit of an encoded or sealed record; 0 if this layout has too many for a header.
    payload_bytes : int
        Of a raw record, without padding; no record has more.
    record_bytes : int
        The header page and a slot.
    starts : sequence of int
        Where the units of a raw record begin in its payload, and where the last one ends.

    Raises
    ------
    ConfigError
        More KV heads than the header has room for, a dtype without a code, or a fingerprint that
        is too long.
    """

    layout: ChunkLayout
    fingerprint: bytes = b""
    sealer: Sealer | None = field(default=None, repr=False, compare=False)
    # Kept, because every record that is read needs them.
    dtype_code: int = field(init=False)
    head_bytes: int = field(init=False)
    unit_bytes: int = field(init=False)
    unit_tokens: int = field(init=False)
    units_per_head: int = field(init=False)
    coded_tokens: int = field(init=False)
    payload_bytes: int = field(init=False)
    record_bytes: int = field(init=False)
    starts: Starts = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        layout = self.layout
        if layout.num_kv_heads > MAX_UNITS:
            raise ConfigError(
                f"a record holds at most {MAX_UNITS} KV heads, not {layout.num_kv_heads}"
            )
        if self.sealer is not None and layout.num_kv_heads > MAX_SEALED_UNITS:
            raise ConfigError(
                f"a sealed record holds at most {MAX_SEALED_UNITS} KV heads, "
                f"not {layout.num_kv_heads}"
            )
        if layout.dtype not in _DTYPE_CODES:
            raise ConfigError(f"chunks of dtype {layout.dtype} cannot be stored on disk")
        if len(self.fingerprint) > FINGERPRINT_BYTES:
            raise ConfigError(
                f"a model fingerprint has at most {FINGERPRINT_BYTES} bytes, "
                f"not {len(self.fingerprint)}"
            )
        tokens, row_bytes = _page_tokens(layout), layout.row_dim * layout.dtype.itemsize
        num_units = layout.num_kv_heads * (layout.chunk_tokens // tokens)
        derived = {
            "dtype_code": _DTYPE_CODES[layout.dtype],
            "head_bytes": layout.chunk_bytes // layout.num_kv_heads,
            "unit_bytes": tokens * row_bytes,
            "unit_tokens": tokens,
            "units_per_head": layout.chunk_tokens // tokens,
            "coded_tokens": _coded_tokens(layout, self._most_coded_units),
            "payload_bytes": layout.chunk_bytes,
            "record_bytes": PAGE_BYTES + layout.slot_bytes,
            "starts": even_starts(num_units, tokens * row_bytes),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @property
    def _most_coded_units(self) -> int:
        return MAX_CODED_UNITS if self.sealer is None else MAX_SEALED_UNITS

    def unit(self, num_tokens: int) -> Unit:
        """Return the shape of units of so many tokens."""
        layout = self.layout
        return Unit(num_tokens, layout.key_dim, layout.value_dim, layout.dtype)


@dataclass(frozen=True, slots=True)
class Seal:
    """What it takes, next to the key, to open the units of a record.

    Attributes
    ----------
    salt : bytes
        Random, of this record alone.
    tags : bytes
        One of each unit.
    """

    salt: bytes
    tags: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Stored:
    """What a header says of one record.

    Attributes
    ----------
    info : ChunkInfo
    codec : int
        0 is raw.
    unit_tokens : int
    checksums : array of int
        The xxh3_64 of each unit as it is stored.
    starts : sequence of int
        Where each unit begins in the payload, and where the last one ends.
    whole : int or None
        The xxh3_64 of the payload, one call instead of many for whoever reads all of it; records of
        version 1 have none.
    seal : Seal or None
        Of a sealed record; ``codec`` says what its units are once they are opened.
    """

    info: ChunkInfo
    codec: int
    unit_tokens: int
    checksums: "array[int]"
    starts: Starts
    whole: int | None
    seal: Seal | None = None

    @property
    def payload_bytes(self) -> int:
        """Bytes of all units."""
        return self.starts[-1]


def even_starts(num_units: int, unit_bytes: int) -> Starts:
    """Return where units of one size begin, and where the last one ends."""
    if not unit_bytes:  # of rows that somebody else's file says are empty
        return [0] * (num_units + 1)
    return range(0, num_units * unit_bytes + 1, unit_bytes)


def raw_record(fmt: RecordFormat, info: ChunkInfo, payload: memoryview) -> Stored:
    """Return what the header of a raw record says; ``payload`` is the whole chunk."""
    checksums = array("Q", checksums_of(payload, fmt.starts))
    whole = xxhash.xxh3_64_intdigest(payload)
    return Stored(info, 0, fmt.unit_tokens, checksums, fmt.starts, whole)


def checksums_of(payload: memoryview, starts: Starts) -> list[int]:
    """Return the xxh3_64 of each unit.

    Parameters
    ----------
    payload : memoryview
        From the first of these units to the end of the last one.
    starts : sequence of int
        Of the units, and the end of the last one; counted from anywhere.
    """
    digest, base = xxhash.xxh3_64_intdigest, starts[0]
    ends = starts[1:]
    return [
        digest(payload[start - base : end - base])
        for start, end in zip(starts[:-1], ends, strict=True)
    ]


def check_payload(payload: memoryview, fmt: RecordFormat, stored: Stored) -> None:
    """Verify all units of a record; as ``check_units``, but faster.

    Raises
    ------
    CorruptChunk
        The payload is not what was written.
    """
    found = None if stored.whole is None else xxhash.xxh3_64_intdigest(payload)
    if found is None or found != stored.whole:
        check_units(payload, fmt, stored)  # which says where it is damaged
    if found != stored.whole:
        raise CorruptChunk(
            f"{name_of(stored.info)}: every unit is as its checksum says, but that of the payload "
            f"is {found:016x}, the record says {stored.whole:016x}"
        )


def check_units(payload: memoryview, fmt: RecordFormat, stored: Stored, first: int = 0) -> None:
    """Verify whole units against the checksums of their record.

    Parameters
    ----------
    payload : memoryview
        Bytes of one or more whole units, as they are stored and without padding.
    fmt : RecordFormat
    stored : Stored
    first : int
        The unit that ``payload`` starts with.

    Raises
    ------
    CorruptChunk
        A unit is not what was written.
    """
    starts, end = stored.starts, stored.starts[first] + len(payload)
    last = first
    while starts[last] < end:
        last += 1
    assert starts[last] == end, "not whole units"
    found = checksums_of(payload, starts[first : last + 1])
    expected = stored.checksums[first:last]
    if found == expected.tolist():
        return
    pairs = enumerate(zip(found, expected, strict=True), first)
    bad = [unit for unit, (ours, theirs) in pairs if ours != theirs]
    head, place = divmod(bad[0] * stored.unit_tokens, fmt.layout.chunk_tokens)
    raise CorruptChunk(
        f"{name_of(stored.info)}: the checksum of {len(bad)} of {len(found)} units is wrong, "
        f"first of head {head} from token {place} of the chunk: {found[bad[0] - first]:016x}, "
        f"the record says {stored.checksums[bad[0]]:016x}"
    )


def name_of(info: ChunkInfo) -> str:
    """Return how messages name a chunk."""
    return f"chunk {info.chunk_id} (layer {info.layer}, token {info.first_token})"


def _page_tokens(layout: ChunkLayout) -> int:
    """Return the fewest tokens of a head that are whole pages; if there are none, all of them."""
    row_bytes = layout.row_dim * layout.dtype.itemsize
    for tokens in range(1, layout.chunk_tokens):
        is_whole = tokens * row_bytes % PAGE_BYTES == 0 and layout.chunk_tokens % tokens == 0
        if is_whole and layout.num_kv_heads * layout.chunk_tokens <= tokens * MAX_UNITS:
            return tokens
    return layout.chunk_tokens


def _coded_tokens(layout: ChunkLayout, most_units: int) -> int:
    tokens = _CODED_TOKENS if layout.chunk_tokens % _CODED_TOKENS == 0 else layout.chunk_tokens
    if layout.num_kv_heads * layout.chunk_tokens > tokens * most_units:
        tokens = layout.chunk_tokens
    return tokens if layout.num_kv_heads <= most_units else 0
