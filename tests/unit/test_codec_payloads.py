"""Bytes of the lossy codecs' payloads: what stands where, what is refused, what is packed."""

import struct
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from offload.errors import CorruptChunk
from offload.tiers.codec_fp8 import Float8Codec
from offload.tiers.codec_int8 import PACKED, PLAIN, Int8Codec
from offload.tiers.codec_kivi import KiviCodec
from offload.tiers.codec_payload import choose_shift
from offload.tiers.codecs import Codec, Unit

UNIT = Unit(64, 32, 32, torch.float16)
HALF_NAN = b"\0\x7e"


def make_rows(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, *UNIT.shape, generator=generator).to(UNIT.dtype)


def decode(codec: Codec, payload: bytes, unit: Unit = UNIT) -> Tensor:
    out = torch.empty(1, *unit.shape, dtype=unit.dtype)
    codec.decode([memoryview(payload)], unit, out)
    return out[0]


@pytest.mark.parametrize("is_compiled", [True, False])
def test_kivi_payload_is_decoded_by_its_definition(is_compiled: bool) -> None:
    unit = Unit(2, 2, 1, torch.float32)
    scales = torch.tensor([2.0, 4.0, -1.0, 0.5, 1.0, 3.0, 10.0, 20.0]).half()
    codes = bytes([0x21, 0x0F, 0x43, 0x01])
    payload = struct.pack("<BBh12x", 1, 0, 0) + scales.numpy().tobytes() + codes
    # A row: two key channels in a byte, the first one low; then the value.
    expected = [
        [-1 + 2 * 1.0, 0.5 + 4 * 2.0, 10 + 1 * 15.0],
        [-1 + 2 * 3.0, 0.5 + 4 * 4.0, 20 + 3.0],
    ]
    assert decode(KiviCodec(4, is_compiled), payload, unit).tolist() == expected


@pytest.mark.parametrize("is_compiled", [True, False])
def test_shift_multiplies_what_is_decoded(is_compiled: bool) -> None:
    codec = KiviCodec(4, is_compiled)
    [payload] = codec.encode(make_rows(), UNIT)
    twice = payload[:2] + struct.pack("<h", 1) + payload[4:]
    assert torch.equal(decode(codec, twice), 2 * decode(codec, payload))


@pytest.mark.parametrize("codec", [KiviCodec(4), KiviCodec(2), Int8Codec(), Float8Codec()], ids=str)
@pytest.mark.parametrize("shift", [257, -257, 30000])
def test_shift_beyond_any_float_is_corrupt(codec: Codec, shift: int) -> None:
    [payload] = codec.encode(make_rows(), UNIT)
    bad = payload[:2] + struct.pack("<h", shift) + payload[4:]
    with pytest.raises(CorruptChunk, match=rf"2\*\*{shift}"):
        decode(codec, bad)


@pytest.mark.parametrize(
    ("codec", "start"), [(KiviCodec(4), 16), (KiviCodec(2), 16), (Int8Codec(), 4)], ids=str
)
@pytest.mark.parametrize("is_compiled", [True, False])
def test_scale_that_is_not_finite_is_corrupt(
    codec: KiviCodec | Int8Codec, start: int, is_compiled: bool
) -> None:
    own = replace(codec, is_compiled=is_compiled)
    [payload] = own.encode(make_rows(), UNIT)
    bad = payload[: start + 6] + HALF_NAN + payload[start + 8 :]
    with pytest.raises(CorruptChunk, match=r"number 3 of .* scales is nan"):
        decode(own, bad)


@pytest.mark.parametrize("is_compiled", [True, False])
def test_int8_payload_is_decoded_by_its_definition(is_compiled: bool) -> None:
    unit = Unit(2, 2, 1, torch.float32)
    scales = torch.tensor([2.0, 4.0, 1.0, -1.0]).half()
    codes = torch.tensor([[127, -127, 5], [-1, 0, -128]], dtype=torch.int8)
    payload = struct.pack("<BBh", PLAIN, 0, 0) + scales.numpy().tobytes() + codes.numpy().tobytes()
    found = decode(Int8Codec(is_compiled=is_compiled), payload, unit)
    assert found[:, :2].tolist() == [[254.0, -508.0], [-2.0, 0.0]]
    assert found[0, 2] == 5
    assert found[1, 2].isnan()


def test_codes_of_int8_are_packed_where_that_helps_and_only_there() -> None:
    unit = Unit(64, 64, 64, torch.float32)
    generator = torch.Generator().manual_seed(0)
    even = torch.rand(1, *unit.shape, generator=generator) * 2 - 1
    # One large element in each group leaves the others few codes.
    peaked = even / 20
    peaked[:, ::64] = peaked[:, :, ::64] = 1
    packed, plain = (Int8Codec().encode(rows, unit)[0] for rows in (peaked, even))
    assert (packed[0], plain[0]) == (PACKED, PLAIN)
    assert len(packed) < 0.8 * len(plain)
    assert len(plain) == Int8Codec().max_bytes(unit)
    assert Int8Codec(is_packing=False).encode(peaked, unit)[0][0] == PLAIN
    assert torch.equal(
        decode(Int8Codec(), packed, unit),
        decode(Int8Codec(), Int8Codec(is_packing=False).encode(peaked, unit)[0], unit),
    )


@pytest.mark.parametrize("is_compiled", [True, False])
def test_every_code_of_fp8_is_the_number_that_torch_says(is_compiled: bool) -> None:
    unit = Unit(2, 128, 0, torch.float32)
    codes = torch.arange(256, dtype=torch.uint8)
    payload = struct.pack("<BBhhxx", 1, 0, 0, 0) + codes.numpy().tobytes()
    found = decode(Float8Codec(is_compiled), payload, unit).flatten()
    expected = codes.view(torch.float8_e4m3fn).float()
    expected[[0x7E, 0xFE]] = torch.tensor([torch.inf, -torch.inf])
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("exponent", range(-140, 120, 7))
@pytest.mark.parametrize("fraction", [0.5, 0.8125, 0.82, 0.999])
def test_largest_element_of_fp8_uses_the_upper_half_of_the_range(
    exponent: int, fraction: float
) -> None:
    unit = Unit(1, 1, 0, torch.float32)
    rows = torch.tensor(fraction, dtype=torch.float64).mul(2.0**exponent).float().view(1, 1, 1)
    [payload] = Float8Codec().encode(rows, unit)
    code = torch.tensor([payload[8]], dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert 208 <= code.item() <= 416


@pytest.mark.parametrize("peak", [0.0, 2.0**-6, 1.0, 2.0**15 - 1])
def test_usual_rows_are_not_shifted(peak: float) -> None:
    assert choose_shift(peak) == 0


@pytest.mark.parametrize("peak", [2.0**-149, 2.0**-7, 2.0**15, 3.4e38])
def test_other_rows_are_shifted_to_where_float16_is_finest(peak: float) -> None:
    assert 2.0**14 <= peak * 2.0 ** -choose_shift(peak) < 2.0**15


@pytest.mark.parametrize(
    ("codec", "place"),
    [(KiviCodec(4), 1), (KiviCodec(2), 4), (KiviCodec(4), 15), (Int8Codec(), 1)]
    + [(Float8Codec(), place) for place in (1, 6, 7)],
    ids=str,
)
def test_reserved_byte_that_is_not_zero_is_corrupt(codec: Codec, place: int) -> None:
    payload = bytearray(codec.encode(make_rows(), UNIT)[0])
    payload[place] = 3
    with pytest.raises(CorruptChunk, match=r"begins with .*\b3\b"):
        decode(codec, bytes(payload))
