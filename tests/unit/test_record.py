import dataclasses
import struct

import pytest
import torch
import xxhash

from offload.errors import ConfigError, CorruptChunk
from offload.tiers.record import MAX_UNITS, RecordFormat, check_units, checksums_of, raw_record
from offload.tiers.record_header import check_header, pack_header, verify
from offload.types import PAGE_BYTES, ChunkInfo, ChunkLayout

_LAYOUT = ChunkLayout(2, 8, 16, 16, torch.bfloat16)
_FORMAT = RecordFormat(_LAYOUT, b"model")
_INFO = ChunkInfo(chunk_id=7, layer=3, first_token=128)


def _make_record(fmt: RecordFormat = _FORMAT, info: ChunkInfo = _INFO) -> tuple[bytes, bytes]:
    payload = bytes(range(256)) * (fmt.layout.slot_bytes // 256)
    stored = raw_record(fmt, info, memoryview(payload)[: fmt.layout.chunk_bytes])
    return pack_header(fmt, stored), payload


def _verify(header: bytes, payload: bytes, fmt: RecordFormat = _FORMAT) -> None:
    verify(memoryview(header), memoryview(payload), fmt, _INFO)


def _flip(data: bytes, position: int, bit: int) -> bytes:
    flipped = bytearray(data)
    flipped[position] ^= 1 << bit
    return bytes(flipped)


def test_record_as_written_is_accepted() -> None:
    header, payload = _make_record()
    assert len(header) == PAGE_BYTES
    assert len(header) + len(payload) == _FORMAT.record_bytes
    _verify(header, payload)


def test_header_has_the_documented_byte_offsets() -> None:
    header, payload = _make_record()
    assert header[:8] == b"KVRECORD"
    assert struct.unpack_from("<HBB", header, 8) == (2, 0, 3)
    assert struct.unpack_from("<5I", header, 12) == (2, 8, 16, 16, 3)
    assert struct.unpack_from("<QQ", header, 32) == (128, 7)
    assert header[48:64] == b"model".ljust(16, b"\0")
    assert struct.unpack_from("<QII", header, 64) == (_LAYOUT.chunk_bytes, 2, 8)
    checksums = checksums_of(memoryview(payload)[: _LAYOUT.chunk_bytes], _FORMAT.starts)
    assert list(struct.unpack_from("<2Q", header, 80)) == checksums
    assert not any(header[96:4080])
    whole = xxhash.xxh3_64_intdigest(payload[: _LAYOUT.chunk_bytes])
    assert struct.unpack_from("<Q", header, 4080) == (whole,)


@pytest.mark.parametrize("bit", [0, 7])
def test_any_flipped_byte_of_the_header_is_detected(bit: int) -> None:
    header, payload = _make_record()
    missed = []
    for position in range(PAGE_BYTES):
        try:
            _verify(_flip(header, position, bit), payload)
        except CorruptChunk:
            continue
        missed.append(position)
    assert missed == []


@pytest.mark.parametrize("bit", [0, 7])
def test_any_flipped_byte_of_the_payload_is_detected(bit: int) -> None:
    header, payload = _make_record()
    missed = []
    for position in range(_LAYOUT.chunk_bytes):
        try:
            _verify(header, _flip(payload, position, bit))
        except CorruptChunk:
            continue
        missed.append(position)
    assert missed == []


def test_flipped_byte_of_the_padding_does_not_matter() -> None:
    header, payload = _make_record()
    _verify(header, _flip(payload, _LAYOUT.chunk_bytes, 0))


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"fingerprint": b"other"}, "model fingerprint"),
        ({"layout": dataclasses.replace(_LAYOUT, dtype=torch.float16)}, "dtype code"),
        ({"layout": dataclasses.replace(_LAYOUT, chunk_tokens=16)}, "chunk_tokens"),
        ({"layout": dataclasses.replace(_LAYOUT, key_dim=8)}, "key_dim"),
        ({"layout": dataclasses.replace(_LAYOUT, value_dim=8)}, "value_dim"),
        ({"layout": dataclasses.replace(_LAYOUT, num_kv_heads=1)}, "num_kv_heads"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_record_of_another_model_is_refused_with_what_differs(
    change: dict[str, object], found: str
) -> None:
    fields = {"layout": _LAYOUT, "fingerprint": b"model"} | change
    header, payload = _make_record(RecordFormat(**fields))  # type: ignore[arg-type]
    with pytest.raises(CorruptChunk, match=rf"chunk 7 \(layer 3, token 128\): {found} should be"):
        _verify(header, payload)


@pytest.mark.parametrize("field", ["chunk_id", "layer", "first_token"])
def test_record_of_another_chunk_is_refused_with_what_differs(field: str) -> None:
    header, payload = _make_record(info=dataclasses.replace(_INFO, **{field: 999}))
    with pytest.raises(CorruptChunk, match=f"{field} should be .*, the record has 999"):
        _verify(header, payload)


def test_page_that_is_no_header_is_refused_with_its_magic() -> None:
    _, payload = _make_record()
    with pytest.raises(CorruptChunk, match=r"header checksum .*x00"):
        _verify(bytes(PAGE_BYTES), payload)


def test_header_of_another_size_is_refused() -> None:
    header, payload = _make_record()
    with pytest.raises(CorruptChunk, match="4095 bytes, not 4096"):
        _verify(header[:-1], payload)


def test_one_head_can_be_verified_alone() -> None:
    header, payload = _make_record()
    stored = check_header(memoryview(header), _FORMAT, _INFO)
    second = memoryview(payload)[_FORMAT.head_bytes : _LAYOUT.chunk_bytes]
    check_units(second, _FORMAT, stored, first=1)
    with pytest.raises(CorruptChunk, match="first of head 1"):
        check_units(memoryview(_flip(bytes(second), 5, 5)), _FORMAT, stored, first=1)


def test_format_with_as_many_heads_as_the_header_holds_is_accepted() -> None:
    fmt = RecordFormat(ChunkLayout(MAX_UNITS, 1, 4, 4, torch.float32))
    assert MAX_UNITS >= 256
    header, payload = _make_record(fmt)
    _verify(header, payload, fmt)


@pytest.mark.parametrize(
    ("layout", "fingerprint", "message"),
    [
        (ChunkLayout(MAX_UNITS + 1, 1, 4, 4, torch.float32), b"", f"at most {MAX_UNITS} KV heads"),
        (ChunkLayout(1, 1, 4, 4, torch.complex64), b"", "complex64 cannot be stored"),
        (_LAYOUT, b"seventeen bytes..", "at most 16 bytes, not 17"),
    ],
    ids=["heads", "dtype", "fingerprint"],
)
def test_format_that_does_not_fit_into_a_header_is_refused(
    layout: ChunkLayout, fingerprint: bytes, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        RecordFormat(layout, fingerprint)


@pytest.mark.parametrize(
    ("layout", "tokens"),
    [
        (ChunkLayout(8, 64, 128, 128, torch.bfloat16), 8),
        (ChunkLayout(2, 64, 16, 16, torch.float32), 32),
        (ChunkLayout(2, 48, 64, 64, torch.bfloat16), 16),
        (ChunkLayout(4, 64, 24, 24, torch.bfloat16), 64),
        (ChunkLayout(8, 5, 128, 128, torch.bfloat16), 5),
        (ChunkLayout(32, 256, 128, 128, torch.bfloat16), 32),
    ],
    ids=["8b", "small", "not a power of two", "odd rows", "odd chunk", "many units"],
)
def test_unit_is_the_shortest_run_of_whole_pages_that_leaves_room_in_the_header(
    layout: ChunkLayout, tokens: int
) -> None:
    assert RecordFormat(layout).unit_tokens == tokens


def test_record_of_version_1_with_a_checksum_per_head_is_read() -> None:
    layout = ChunkLayout(2, 64, 16, 16, torch.float32)
    fmt = RecordFormat(layout, b"model")
    payload = bytes(range(256)) * (layout.chunk_bytes // 256)
    header = _version_1(fmt, payload)
    stored = verify(memoryview(header), memoryview(payload), fmt, _INFO)
    assert (stored.unit_tokens, len(stored.checksums)) == (64, 2)
    with pytest.raises(CorruptChunk, match="1 of 2 units is wrong, first of head 1"):
        verify(memoryview(header), memoryview(_flip(payload, 9000, 1)), fmt, _INFO)


@pytest.mark.parametrize(
    ("offset", "value", "message"),
    [
        (8, b"\x04\x00", "format version 4"),
        (8, b"\x01\x00\x01", "format version 1, codec 1"),
        (72, b"\x03", "3 units of 8 tokens"),
        (76, b"\x03", "2 units of 3 tokens"),
        (76, b"\x00", "2 units of 0 tokens"),
        (64, b"\x01", "payload of"),
    ],
)
def test_header_whose_fields_do_not_fit_together_is_corrupt(
    offset: int, value: bytes, message: str
) -> None:
    header, payload = _make_record()
    with pytest.raises(CorruptChunk, match=message):
        _verify(_with_field(header, offset, value), payload)


def test_payload_that_only_its_own_checksum_disagrees_with_is_corrupt() -> None:
    header, payload = _make_record()
    with pytest.raises(CorruptChunk, match="every unit is as its checksum says"):
        _verify(_with_field(header, 4080, b"12345678"), payload)


def _version_1(fmt: RecordFormat, payload: bytes) -> bytes:
    """Return a header page as version 1 wrote it."""
    heads = [payload[i : i + fmt.head_bytes] for i in range(0, len(payload), fmt.head_bytes)]
    header = bytearray(pack_header(fmt, raw_record(fmt, _INFO, memoryview(payload))))
    header[8:10] = b"\x01\x00"
    checksums = [xxhash.xxh3_64_intdigest(head) for head in heads]
    struct.pack_into("<I4x", header, 72, len(heads))
    header[80:4088] = struct.pack(f"<{len(heads)}Q", *checksums).ljust(4008, b"\0")
    return _with_field(bytes(header), 0, b"")


def _with_field(header: bytes, offset: int, value: bytes) -> bytes:
    """Return a header with some bytes exchanged, and its own checksum made right again."""
    page = header[:offset] + value + header[offset + len(value) : 4088]
    return page + struct.pack("<Q", xxhash.xxh3_64_intdigest(page))
