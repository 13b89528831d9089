import dataclasses
import struct

import pytest
import torch

from offload.errors import ConfigError, CorruptChunk
from offload.tiers.record import (
    MAX_HEADS,
    RecordFormat,
    check_header,
    check_heads,
    digest_heads,
    pack_header,
    verify,
)
from offload.types import PAGE_BYTES, ChunkInfo, ChunkLayout

_LAYOUT = ChunkLayout(2, 8, 16, 16, torch.bfloat16)
_FORMAT = RecordFormat(_LAYOUT, b"model")
_INFO = ChunkInfo(chunk_id=7, layer=3, first_token=128)


def _make_record(fmt: RecordFormat = _FORMAT, info: ChunkInfo = _INFO) -> tuple[bytes, bytes]:
    payload = bytes(range(256)) * (fmt.layout.slot_bytes // 256)
    digests = digest_heads(memoryview(payload)[: fmt.layout.chunk_bytes], fmt.head_bytes)
    return pack_header(fmt, info, digests), payload


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
    assert struct.unpack_from("<HBB", header, 8) == (1, 0, 3)
    assert struct.unpack_from("<5I", header, 12) == (2, 8, 16, 16, 3)
    assert struct.unpack_from("<QQ", header, 32) == (128, 7)
    assert header[48:64] == b"model".ljust(16, b"\0")
    assert struct.unpack_from("<QI", header, 64) == (_LAYOUT.chunk_bytes, 2)
    digests = digest_heads(memoryview(payload)[: _LAYOUT.chunk_bytes], _FORMAT.head_bytes)
    assert struct.unpack_from("<2Q", header, 80) == digests
    assert not any(header[96:4088])


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
    digests = check_header(memoryview(header), _FORMAT, _INFO)
    second = memoryview(payload)[_FORMAT.head_bytes : _LAYOUT.chunk_bytes]
    check_heads(second, _FORMAT, _INFO, digests, first=1)
    with pytest.raises(CorruptChunk, match="first of head 1"):
        check_heads(memoryview(_flip(bytes(second), 5, 5)), _FORMAT, _INFO, digests, first=1)


def test_format_with_as_many_heads_as_the_header_holds_is_accepted() -> None:
    fmt = RecordFormat(ChunkLayout(MAX_HEADS, 1, 4, 4, torch.float32))
    assert MAX_HEADS >= 256
    header, payload = _make_record(fmt)
    _verify(header, payload, fmt)


@pytest.mark.parametrize(
    ("layout", "fingerprint", "message"),
    [
        (ChunkLayout(MAX_HEADS + 1, 1, 4, 4, torch.float32), b"", f"at most {MAX_HEADS} KV heads"),
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
