"""Keys and values in 4 and 2 bits: how far off, where the bits lie, and attention on the codes."""

import pytest
import torch
from torch import Tensor

from offload.kernels import reference
from offload.kernels.kivi import (
    KEYS,
    VALUES,
    Axis,
    Bits,
    Kivi,
    attend_kivi,
    dequantise,
    half_above,
    half_below,
    pack,
    quantise,
    unpack,
)

every_width = pytest.mark.parametrize("num_bits", [4, 2])
every_axis = pytest.mark.parametrize("axis", [KEYS, VALUES], ids=["keys", "values"])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spans(packed: Kivi, axis: Axis, shape: torch.Size) -> Tensor:
    own = packed.scales.float().repeat_interleave(32, axis)
    return own.narrow(axis, 0, shape[axis])


@every_width
@every_axis
@pytest.mark.parametrize("shape", [(64, 128), (1, 1), (33, 70)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_no_element_is_off_by_more_than_half_its_scale(
    num_bits: Bits, axis: Axis, shape: tuple[int, int], offset: float
) -> None:
    rows = draw(2, *shape) + offset
    packed = quantise(rows, num_bits, axis)
    off = (dequantise(packed, num_bits, axis, shape[1]) - rows).abs()
    assert (off <= spans(packed, axis, rows.shape) / 2 * 1.0001).all()


@every_width
@every_axis
def test_scales_are_hardly_larger_than_the_range_needs(num_bits: Bits, axis: Axis) -> None:
    rows = draw(64, 64)
    packed = quantise(rows, num_bits, axis)
    groups = rows.unflatten(axis, (2, 32))
    needed = (groups.amax(axis) - groups.amin(axis)) / ((1 << num_bits) - 1)
    assert (packed.scales.float() <= needed * 1.002).all()


@every_axis
def test_group_of_one_number_is_exact(axis: Axis) -> None:
    rows = torch.full((32, 32), 3.25)
    packed = quantise(rows, 4, axis)
    assert not packed.scales.any()
    assert torch.equal(dequantise(packed, 4, axis, 32), rows)


@every_width
@every_axis
def test_group_with_elements_that_are_not_finite_keeps_codes_for_them(
    num_bits: Bits, axis: Axis
) -> None:
    rows = draw(64, 64)
    rows[3, 3:6] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    packed = quantise(rows, num_bits, axis)
    found = dequantise(packed, num_bits, axis, 64)
    assert torch.equal(found[3, 3:6].nan_to_num(7, 8, 9), rows[3, 3:6].nan_to_num(7, 8, 9))
    assert int(packed.scales.signbit().sum()) == (3 if axis == KEYS else 1)
    off = (found - rows).abs()[rows.isfinite()]
    assert (off <= spans(packed, axis, rows.shape).abs()[rows.isfinite()] / 2 * 1.0001).all()


@pytest.mark.parametrize("number", [0.0, 1e-9, 6e-8, 0.1, 1.0, 1.0001, 3000.7, 32767.9])
def test_halves_above_and_below_are_the_nearest_ones(number: float) -> None:
    for sign in (1, -1):
        below = half_below(torch.tensor([sign * number]))
        following = torch.nextafter(below, torch.tensor([torch.inf], dtype=torch.float16))
        assert below.item() <= torch.tensor(sign * number).item() < following.item()
    above = half_above(torch.tensor([number]))
    before = torch.nextafter(above, torch.tensor([-torch.inf], dtype=torch.float16))
    assert before.item() < torch.tensor(number).item() <= above.item()
    assert not above.signbit().any()


def test_byte_holds_channels_a_row_of_bytes_apart_from_its_lowest_bits_up() -> None:
    codes = torch.tensor([[0, 1, 2, 3, 1, 2, 3]], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [[0x10, 0x21, 0x32, 0x03]]
    assert pack(codes, 2).tolist() == [[0b11_01_10_00, 0b00_10_11_01]]


@every_width
@pytest.mark.parametrize("dim", [1, 2, 3, 4, 5, 31, 64])
def test_unpack_after_pack_gives_the_same_codes(num_bits: Bits, dim: int) -> None:
    generator = torch.Generator().manual_seed(dim)
    codes = torch.randint(0, 1 << num_bits, (7, dim), generator=generator).to(torch.uint8)
    assert torch.equal(unpack(pack(codes, num_bits), num_bits, dim), codes)


@every_width
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize(
    ("tokens", "key_dim", "value_dim"), [(64, 64, 64), (40, 48, 70), (1, 3, 1)]
)
def test_attention_on_codes_is_that_over_what_they_stand_for(
    num_bits: Bits, group: int, num_queries: int, tokens: int, key_dim: int, value_dim: int
) -> None:
    query = draw(2, 2 * group, num_queries, key_dim, seed=1)
    keys, values = draw(2, 3, 2, tokens, key_dim, seed=2), draw(2, 3, 2, tokens, value_dim, seed=3)
    packed = quantise(keys, num_bits, KEYS), quantise(values, num_bits, VALUES)
    found = attend_kivi(query, *packed, num_bits=num_bits, value_dim=value_dim, scale=0.3)
    rows = (
        dequantise(packed[0], num_bits, KEYS, key_dim),
        dequantise(packed[1], num_bits, VALUES, value_dim),
    )
    expected = reference.partial_attention(query, *rows, scale=0.3)
    torch.testing.assert_close(found.out, expected.out, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.lse, expected.lse, rtol=1e-4, atol=1e-5)


def test_partial_attention_on_codes_merges_with_that_on_rows() -> None:
    query, keys, values = (
        draw(1, 4, 1, 32),
        draw(1, 4, 2, 32, 32, seed=1),
        draw(1, 4, 2, 32, 32, seed=2),
    )
    packed = quantise(keys, 4, KEYS), quantise(values, 4, VALUES)
    rows = dequantise(packed[0], 4, KEYS, 32), dequantise(packed[1], 4, VALUES, 32)
    half = [Kivi(*(part[:, :2] for part in own)) for own in packed]
    parts = [
        attend_kivi(query, *half, num_bits=4, value_dim=32, scale=0.2),
        reference.partial_attention(query, rows[0][:, 2:], rows[1][:, 2:], scale=0.2),
    ]
    expected = reference.partial_attention(query, *rows, scale=0.2)
    torch.testing.assert_close(reference.merge(parts).out, expected.out, rtol=1e-4, atol=1e-5)
