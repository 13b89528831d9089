"""Codes give unbiased inner products, with the noise they say, and hold every level they are given.

What is expected of the noise is theory: a Lloyd-Max quantiser of 1 or 2 bits leaves 0.3634 or
0.1175 of the variance of a normal variable, and that is what a random direction's coordinates are.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import normalize

from offload.kernels.codes import (
    Codes,
    decode,
    encode,
    inner_products,
    level_norm,
    noise,
    rotation,
    unpack,
)

DISTORTION = {1: 0.3634, 2: 0.1175}
LEVELS = {1: [-1.0, 1.0], 2: [-1.51, -0.4528, 0.4528, 1.51]}

bits = st.sampled_from([1, 2])
dims = st.sampled_from([8, 20, 33, 64, 80, 96, 100, 128, 256])
seeds = st.integers(0, 2**31 - 1)


def rows(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lengths_of(num_rows: int, seed: int) -> Tensor:
    return rows(num_rows, 1, seed=seed).exp()


@pytest.mark.parametrize("dim", [1, 2, 33, 64, 128, 256])
def test_rotation_keeps_lengths_and_angles(dim: int) -> None:
    turn = rotation(dim)
    torch.testing.assert_close(turn @ turn.T, torch.eye(dim), atol=1e-6, rtol=0)


def test_rotation_is_the_same_forever() -> None:
    """Scenario: codes written by one version are searched by another, on another machine."""
    expected = torch.tensor(
        [
            [0.4272, 0.5580, 0.7114],
            [0.8769, -0.4476, -0.1754],
            [0.2206, 0.6987, -0.6805],
        ]
    )
    torch.testing.assert_close(rotation(3), expected, atol=1e-4, rtol=0)


@given(bits, st.integers(1, 70), seeds)
def test_unpacked_codes_are_the_nearest_levels(num_bits: int, dim: int, seed: int) -> None:
    vectors = rows(5, dim, seed=seed)
    codes = encode(vectors, num_bits, unbiased=False)
    assert codes.bits.shape == (5, -(-dim * num_bits // 8))
    scaled = vectors / vectors.norm(dim=-1, keepdim=True) * math.sqrt(dim)
    levels = torch.tensor(LEVELS[num_bits])
    nearest = levels[(scaled.unsqueeze(-1) - levels).abs().argmin(-1)]
    # A coordinate half way between two levels may go to either.
    edges = (levels[1:] + levels[:-1]) / 2
    sure = ((scaled.unsqueeze(-1) - edges).abs() > 1e-3).all(-1)
    assert torch.equal(unpack(codes.bits, num_bits, dim)[sure], nearest[sure])


@given(bits, st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_every_byte_unpacks_to_the_levels_of_its_bits(num_bits: int, packed: list[int]) -> None:
    expected = [
        LEVELS[num_bits][byte >> shift & (1 << num_bits) - 1]
        for byte in packed
        for shift in range(0, 8, num_bits)
    ]
    unpacked = unpack(torch.tensor(packed, dtype=torch.uint8), num_bits, len(expected))
    assert unpacked.tolist() == pytest.approx(expected)


@given(bits, dims, seeds)
def test_inner_products_over_many_pairs_have_no_bias(num_bits: int, dim: int, seed: int) -> None:
    num_pairs, turn = 10_000, rotation(dim)
    directions = normalize(rows(num_pairs, 1, dim, seed=seed), dim=-1)
    # Queries lean towards their vectors, so that codes which are too short would show.
    query = normalize(directions + rows(num_pairs, 1, dim, seed=seed + 1) / math.sqrt(dim), dim=-1)
    lengths = lengths_of(num_pairs, seed + 2).unsqueeze(-1)
    codes = encode(directions * lengths @ turn, num_bits, unbiased=True)
    found = inner_products(query @ turn, codes, num_bits) / lengths
    errors = found - query @ directions.mT
    assert abs(float(errors.mean())) < 6 * float(errors.std()) / math.sqrt(num_pairs)


@given(bits, st.sampled_from([33, 64, 96, 128, 256]), seeds)
def test_inner_products_scatter_as_noise_says(num_bits: int, dim: int, seed: int) -> None:
    query, vectors = rows(1, 8, dim, seed=seed), rows(4000, dim, seed=seed + 1)
    codes = encode(vectors, num_bits, unbiased=True)
    found = inner_products(query, Codes(codes.bits[None], codes.scale[None]), num_bits)
    length = codes.scale.float() * level_norm(num_bits, dim)
    expected = query.norm(dim=-1).unsqueeze(-1) * length * noise(num_bits, dim)
    scatter = ((found - query @ vectors.T) / expected).square().mean().sqrt()
    assert 0.9 < float(scatter) < 1.1


@given(bits, st.sampled_from([64, 80, 128, 256]), seeds)
def test_decoded_vectors_miss_what_theory_says(num_bits: int, dim: int, seed: int) -> None:
    vectors = rows(2000, dim, seed=seed) * lengths_of(2000, seed + 1)
    codes = encode(vectors, num_bits, unbiased=False)
    missed = (decode(codes, num_bits, dim) - vectors).square().sum(-1)
    share = float((missed / vectors.square().sum(-1)).mean())
    assert share == pytest.approx(DISTORTION[num_bits], rel=0.05)


@given(bits, dims, seeds)
def test_decoded_vectors_are_scaled_for_the_least_error(num_bits: int, dim: int, seed: int) -> None:
    vectors = rows(50, dim, seed=seed)
    codes = encode(vectors, num_bits, unbiased=False)

    def error_with(factor: float) -> Tensor:
        decoded = decode(Codes(codes.bits, codes.scale.float() * factor), num_bits, dim)
        missed: Tensor = (decoded - vectors).norm(dim=-1)
        return missed

    assert bool((error_with(1.0) <= error_with(0.98)).all())
    assert bool((error_with(1.0) <= error_with(1.02)).all())


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("num_bits", [1, 2])
def test_zero_vectors_have_inner_products_of_zero(num_bits: int, unbiased: bool) -> None:
    codes = encode(torch.zeros(1, 3, 64), num_bits, unbiased=unbiased)
    found = inner_products(rows(1, 4, 64, seed=0), codes, num_bits)
    assert torch.equal(found, torch.zeros(1, 4, 3))


@pytest.mark.parametrize("length", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("num_bits", [1, 2])
def test_a_vector_along_one_coordinate_is_found_again(num_bits: int, length: float) -> None:
    """Scenario: the worst direction for codes that were not rotated."""
    vector = torch.zeros(1, 1, 64)
    vector[..., 5] = length
    turn = rotation(64)
    codes = encode(vector @ turn, num_bits, unbiased=True)
    found = inner_products(vector @ turn, codes, num_bits)
    assert float(found) == pytest.approx(length**2, rel=4e-3)
