"""What every codec must do: bits or bounded errors back, payloads of a stated size, no nonsense."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload.errors import ConfigError, CorruptChunk
from offload.tiers.codec_exponents import ExponentCodec
from offload.tiers.codec_fp8 import Float8Codec
from offload.tiers.codec_int8 import Int8Codec
from offload.tiers.codec_kivi import KiviCodec
from offload.tiers.codec_ladder import CODECS
from offload.tiers.codecs import Codec, Unit

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = [
    (64, 128, 128),
    (1, 64, 64),
    (33, 40, 24),
    (70, 65, 97),
    (16, 48, 0),
    (5, 0, 33),
    (1, 1, 0),
]
UNIT = Unit(40, 33, 65, torch.bfloat16)

every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
every_lossy = pytest.mark.parametrize(
    "codec", [codec for codec in CODECS.values() if not codec.is_lossless], ids=lambda own: own.name
)
every_marked = pytest.mark.parametrize(
    "codec", [codec for codec in CODECS.values() if codec.number], ids=lambda own: own.name
)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make_rows(unit: Unit, num_units: int = 3, seed: int = 0, size: float = 1.0) -> Tensor:
    """Return rows whose channels differ in mean and in size, as those of keys do."""
    generator = torch.Generator().manual_seed(seed)
    dim = unit.shape[1]
    noise = torch.randn(num_units, *unit.shape, generator=generator)
    channels = torch.randn(2, dim, generator=generator)
    return ((noise * channels[0].exp() + 3 * channels[1]) * size).to(unit.dtype)


def round_trip(codec: Codec, rows: Tensor, unit: Unit) -> Tensor:
    out = torch.full_like(rows, 7)
    codec.decode([memoryview(own) for own in codec.encode(rows, unit)], unit, out)
    return out


def same_bits(found: Tensor, expected: Tensor) -> bool:
    return torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def group_bounds(rows: Tensor, axis: int, size: int) -> tuple[Tensor, Tensor]:
    """Return for each element the least and the largest finite one of its group."""
    low, high = torch.empty_like(rows), torch.empty_like(rows)
    if not rows.numel():
        return low, high
    finite = rows.isfinite()
    pieces = zip(*(own.split(size, axis) for own in (rows, finite, low, high)), strict=True)
    for own, is_finite, own_low, own_high in pieces:
        own_low[:] = own.where(is_finite, torch.inf).amin(axis, keepdim=True)
        own_high[:] = own.where(is_finite, -torch.inf).amax(axis, keepdim=True)
    return low, high


def largest_error(codec: Codec, rows: Tensor, unit: Unit) -> Tensor:
    """Return how far off each element may be, by the definitions of the codecs alone."""
    wide = rows.double()
    rounding = torch.finfo(unit.dtype).eps * wide.abs() + torch.finfo(unit.dtype).tiny
    if codec.name == "fp8":
        return wide.abs() / 16 + wide.abs().max() * 2.0**-17 + rounding
    size = 64 if codec.name == "int8" else 32
    spans = [
        group_bounds(part, axis, size) for part, axis in zip(split(wide, unit), (1, 2), strict=True)
    ]
    low, high = (torch.cat(sides, 2) for sides in zip(*spans, strict=True))
    # Zeros and scales have 11 bits; the smallest of them are in units of a 2**-24th.
    least = 2.0**-20 * max(1.0, float(wide.abs().max()) * 2.0**-14)
    if codec.name == "int8":
        return torch.maximum(low.abs(), high.abs()) / 253 + least + rounding
    steps = 15 if codec.name == "kivi4" else 3
    return (high - low) / (2 * steps) * 1.002 + low.abs() * 2.0**-10 + least + rounding


def split(rows: Tensor, unit: Unit) -> tuple[Tensor, ...]:
    parts: tuple[Tensor, ...] = rows.split([unit.key_dim, unit.value_dim], 2)
    return parts


@every_codec
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_gives_every_bit_or_stays_within_the_error(
    codec: Codec, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    unit = Unit(*shape, dtype)
    rows = make_rows(unit)
    found = round_trip(codec, rows, unit)
    if codec.is_lossless:
        assert same_bits(found, rows)
    else:
        assert ((found.double() - rows.double()).abs() <= largest_error(codec, rows, unit)).all()


@every_codec
@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("special", [0.0, torch.nan])
def test_payload_is_never_empty_nor_above_the_stated_size(
    codec: Codec, dtype: torch.dtype, shape: tuple[int, int, int], special: float
) -> None:
    unit = Unit(*shape, dtype)
    rows = make_rows(unit)
    rows[0, 0] = special
    rows[1].view(torch.uint8).random_(generator=torch.Generator().manual_seed(1))
    sizes = {len(payload) for payload in codec.encode(rows, unit)}
    most = codec.max_bytes(unit)
    assert min(sizes) >= 1
    assert max(sizes) <= most
    if codec.name in {"raw", "fp8", "kivi4", "kivi2"}:
        assert sizes == {most}


@every_codec
@every_dtype
@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-7, 1e-3, 1e4, 1e30])
def test_round_trip_of_any_size_stays_within_the_error(
    codec: Codec, dtype: torch.dtype, size: float
) -> None:
    unit = Unit(40, 33, 65, dtype)
    rows = make_rows(unit, size=size).nan_to_num()
    found = round_trip(codec, rows, unit)
    assert found.isfinite().all()
    if codec.is_lossless:
        assert same_bits(found, rows)
        return
    error = (found.double() - rows.double()).norm() / rows.double().norm().clamp_min(1e-300)
    smallest = rows.double().abs().max() <= torch.finfo(dtype).tiny
    assert error <= (1.0 if smallest else 0.5)


@every_codec
@every_dtype
@pytest.mark.parametrize("where", [0, 40], ids=["key", "value"])
@pytest.mark.parametrize("specials", [[torch.nan], [torch.inf, -torch.inf], [torch.nan, torch.inf]])
def test_elements_that_are_not_finite_come_back_and_spoil_no_others(
    codec: Codec, dtype: torch.dtype, where: int, specials: list[float]
) -> None:
    unit = Unit(40, 33, 65, dtype)
    rows = make_rows(unit)
    rows[1, 3, where : where + len(specials)] = torch.tensor(specials, dtype=dtype)
    found = round_trip(codec, rows, unit)
    is_finite = rows.isfinite()
    assert torch.equal(found.isfinite(), is_finite)
    assert torch.equal(found.isnan(), rows.isnan())
    assert torch.equal(found[~is_finite & ~rows.isnan()], rows[~is_finite & ~rows.isnan()])
    plain = rows.where(is_finite, rows[1, 4, where])
    assert same_bits(found[0], round_trip(codec, plain, unit)[0])
    if codec.is_lossless:
        assert same_bits(found, rows)
    else:
        # Few codes are left in their groups, and in groups of two bits a single one.
        worst = largest_error(codec, plain, unit)
        worst[1] += plain.double().max() - plain.double().min()
        assert ((found.double() - rows.double()).abs() <= worst)[is_finite].all()


@every_codec
@every_dtype
def test_units_of_nothing_but_what_is_not_finite_come_back(
    codec: Codec, dtype: torch.dtype
) -> None:
    unit = Unit(3, 2, 1, dtype)
    rows = torch.tensor([torch.nan, torch.inf, -torch.inf]).expand(1, 3, 3).to(dtype).contiguous()
    found = round_trip(codec, rows, unit)
    assert torch.equal(found.isnan(), rows.isnan())
    assert torch.equal(found[..., 1:], rows[..., 1:])


@every_codec
@every_dtype
@pytest.mark.parametrize("number", [0.0, -0.0, 1.0, -3.28125, 6e-5])
def test_rows_of_one_number_come_back_nearly(
    codec: Codec, dtype: torch.dtype, number: float
) -> None:
    unit = Unit(40, 33, 65, dtype)
    rows = torch.full((1, *unit.shape), number, dtype=dtype)
    found = round_trip(codec, rows, unit)
    torch.testing.assert_close(found, rows, rtol=1 / 16, atol=1e-7)
    assert same_bits(found, rows) or not codec.is_lossless


@every_codec
@every_dtype
@given(data=st.data())
def test_lossless_or_finite_whatever_the_bits(
    codec: Codec, dtype: torch.dtype, data: st.DataObject
) -> None:
    dims = st.integers(0, 70)
    shape = data.draw(st.tuples(st.integers(1, 70), dims, dims).filter(lambda own: sum(own[1:])))
    unit = Unit(*shape, dtype)
    seed = data.draw(st.integers(0, 2**32))
    bits = torch.randint(0, 256, (1, unit.num_bytes), generator=torch.Generator().manual_seed(seed))
    rows = bits.to(torch.uint8).view(dtype).view(1, *unit.shape)
    found = round_trip(codec, rows, unit)
    assert torch.equal(found.isfinite(), rows.isfinite())
    assert same_bits(found, rows) or not codec.is_lossless


@every_codec
def test_payloads_do_not_depend_on_their_neighbours_and_decode_in_any_order(codec: Codec) -> None:
    rows = make_rows(UNIT, 4)
    payloads = codec.encode(rows, UNIT)
    assert payloads == [codec.encode(own[None], UNIT)[0] for own in rows]
    out, again = torch.empty_like(rows), torch.empty_like(rows)
    codec.decode([memoryview(own) for own in payloads], UNIT, out)
    codec.decode([memoryview(own) for own in payloads[::-1]], UNIT, again)
    assert same_bits(again.flip(0), out)


@every_codec
def test_no_units_are_no_payloads(codec: Codec) -> None:
    rows = torch.empty(0, *UNIT.shape, dtype=UNIT.dtype)
    assert codec.encode(rows, UNIT) == []
    codec.decode([], UNIT, rows)


@every_codec
def test_decode_fills_rows_that_lie_apart_and_nothing_between_them(codec: Codec) -> None:
    rows = make_rows(UNIT)
    payloads = [memoryview(bytearray(own)) for own in codec.encode(rows, UNIT)]
    wide = torch.full((3, UNIT.num_tokens, 2 * UNIT.shape[1]), 7, dtype=UNIT.dtype)
    codec.decode(payloads, UNIT, wide[..., : UNIT.shape[1]])
    assert same_bits(wide[..., : UNIT.shape[1]].contiguous(), round_trip(codec, rows, UNIT))
    assert (wide[..., UNIT.shape[1] :] == 7).all()


@every_codec
def test_threads_encode_and_decode_as_one_does(codec: Codec) -> None:
    rows = [make_rows(UNIT, seed=seed) for seed in range(16)]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda own: round_trip(codec, own, UNIT), rows))
    assert all(
        same_bits(own, round_trip(codec, wanted, UNIT))
        for own, wanted in zip(found, rows, strict=True)
    )


@every_codec
@pytest.mark.parametrize("change", [-1, 1, -100], ids=str)
def test_payload_cut_short_or_too_long_is_corrupt(codec: Codec, change: int) -> None:
    [payload] = codec.encode(make_rows(UNIT, 1), UNIT)
    bad = payload[:change] if change < 0 else payload + bytes(change)
    with pytest.raises(CorruptChunk, match=rf"^{codec.name}: .*\d"):
        codec.decode([memoryview(bad)], UNIT, torch.empty(1, *UNIT.shape, dtype=UNIT.dtype))


@every_codec
@pytest.mark.parametrize("num_bytes", [0, 1, 15])
def test_payload_of_hardly_any_bytes_is_corrupt(codec: Codec, num_bytes: int) -> None:
    bad = memoryview(bytes([1]) * num_bytes)
    with pytest.raises(CorruptChunk, match=rf"^{codec.name}: .*\d"):
        codec.decode([bad], UNIT, torch.empty(1, *UNIT.shape, dtype=UNIT.dtype))


@every_marked
@pytest.mark.parametrize("mode", [9, 0x80, 0xFF])
def test_payload_of_an_unknown_mode_is_corrupt(codec: Codec, mode: int) -> None:
    [payload] = codec.encode(make_rows(UNIT, 1), UNIT)
    bad = memoryview(bytes([mode]) + payload[1:])
    with pytest.raises(CorruptChunk, match=rf"^{codec.name}: .*\b{mode}\b"):
        codec.decode([bad], UNIT, torch.empty(1, *UNIT.shape, dtype=UNIT.dtype))


@every_codec
@given(data=st.data())
def test_damaged_payload_is_corrupt_or_some_other_rows(codec: Codec, data: st.DataObject) -> None:
    unit = Unit(9, 34, 31, torch.bfloat16)
    payload = bytearray(codec.encode(make_rows(unit, 1), unit)[0])
    for _ in range(data.draw(st.integers(1, 4))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    decode_or_refuse(codec, bytes(payload), unit)


@every_codec
@given(st.binary(max_size=200))
def test_any_bytes_are_corrupt_or_some_rows(codec: Codec, payload: bytes) -> None:
    unit = Unit(2, 3, 5, torch.float16)
    decode_or_refuse(codec, payload, unit)
    decode_or_refuse(codec, payload.ljust(codec.max_bytes(unit), b"\0"), unit)


def decode_or_refuse(codec: Codec, payload: bytes, unit: Unit) -> None:
    """Decode between guards; nothing but CorruptChunk may be raised."""
    room = torch.full((3, *unit.shape), 7, dtype=unit.dtype)
    with suppress(CorruptChunk):
        codec.decode([memoryview(payload)], unit, room[1:2])
    assert (room[::2] == 7).all()


@every_codec
@pytest.mark.parametrize("shape", [(0, 8, 8), (4, 0, 0), (4, -2, 8)], ids=str)
def test_unit_without_elements_is_refused(codec: Codec, shape: tuple[int, int, int]) -> None:
    with pytest.raises(ConfigError, match=rf"{codec.name} .* {shape[0]} tokens"):
        codec.max_bytes(Unit(*shape, torch.bfloat16))


@every_lossy
@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.float8_e4m3fn], ids=str)
def test_lossy_codec_refuses_other_dtypes_by_name(codec: Codec, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=str(dtype).removeprefix("torch.")):
        codec.max_bytes(Unit(4, 8, 8, dtype))


@pytest.mark.parametrize("name", ["raw", "bf16x"])
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.float64, torch.float8_e4m3fn], ids=str
)
def test_lossless_codec_takes_any_dtype(name: str, dtype: torch.dtype) -> None:
    unit = Unit(40, 33, 65, dtype)
    rows = make_rows(Unit(40, 33, 65, torch.float64)).to(dtype)
    assert same_bits(round_trip(CODECS[name], rows, unit), rows)


COMPILED: list[tuple[Any, dict[str, Any]]] = [
    (ExponentCodec, {}),
    (Int8Codec, {}),
    (Int8Codec, {"is_packing": False}),
    (Float8Codec, {}),
    (KiviCodec, {"num_bits": 4}),
    (KiviCodec, {"num_bits": 2}),
]


@every_dtype
@pytest.mark.parametrize(("kind", "options"), COMPILED)
@given(data=st.data())
def test_kernels_give_the_bits_of_the_reference(
    kind: Any, options: dict[str, Any], dtype: torch.dtype, data: st.DataObject
) -> None:
    pytest.importorskip("numba", reason="compiled kernels need numba")
    dims = st.integers(0, 140)
    shape = data.draw(
        st.tuples(dims.map(lambda own: own + 1), dims, dims).filter(lambda own: sum(own[1:]))
    )
    unit, size = Unit(*shape, dtype), 10.0 ** data.draw(st.integers(-6, 5))
    rows = make_rows(unit, 2, data.draw(st.integers(0, 1000)), size)
    rows[0, 0] = data.draw(st.sampled_from([0.0, -0.0, 1e-6, -1e-6, 1.0, torch.nan]))
    fast, plain = kind(**options), kind(**options, is_compiled=False)
    assert fast.encode(rows, unit) == plain.encode(rows, unit)
    assert same_bits(round_trip(fast, rows, unit), round_trip(plain, rows, unit))
