"""Codes give unbiased inner products, with the noise they say, and hold every level they are given.

What is expected of the noise is theory: the best quantiser with 1 bit, or 2 and equal steps, leaves
0.3634 or 0.1188 of the variance of a normal variable, and that is what a random direction's
coordinates are.
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
    middle,
    noise,
    pack,
    quantise,
    rotation,
    unpack,
)
from offload.kernels.sign_planes import pack_signs, signs_at, unpack_signs

DISTORTION = {1: 0.3634, 2: 0.1188}
LEVELS = {1: [-0.5, 0.5], 2: [-1.5, -0.5, 0.5, 1.5]}
STEP = {1: 1.0, 2: 0.9957}

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
    vectors = rows(1, 21, dim, seed=seed)
    codes = encode(vectors, num_bits, unbiased=False)
    num_words = -(-dim * num_bits // 32)
    assert codes.bits.shape == (1, 2, num_words, 16, 4)
    assert codes.scale.shape == (1, 32)
    scaled = vectors / vectors.norm(dim=-1, keepdim=True) * math.sqrt(dim) / STEP[num_bits]
    levels = torch.tensor(LEVELS[num_bits])
    nearest = levels[(scaled.unsqueeze(-1) - levels).abs().argmin(-1)]
    # A coordinate half way between two levels may go to either.
    edges = (levels[1:] + levels[:-1]) / 2
    sure = ((scaled.unsqueeze(-1) - edges).abs() > 1e-3).all(-1)
    assert torch.equal(unpack(codes.bits, num_bits, dim)[:, :21][sure], nearest[sure])


@given(bits, st.integers(1, 70), st.integers(1, 40), seeds)
def test_packed_numbers_are_where_the_layout_says(
    num_bits: int, dim: int, num_vectors: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 1 << num_bits, (2, num_vectors, dim), generator=generator)
    packed = pack(numbers.to(torch.uint8), num_bits)
    vector, place = num_vectors - 1, dim - 1
    word, within = divmod(place, 32 // num_bits)
    plane, byte = divmod(within, 4)
    found = packed[:, vector // 16, word, vector % 16, byte] >> plane * num_bits
    assert torch.equal((found & (1 << num_bits) - 1).long(), numbers[:, vector, place])


@given(st.integers(1, 40), seeds)
def test_packed_signs_are_where_the_layout_says(num_vectors: int, seed: int) -> None:
    positive = rows(2, num_vectors, 32, seed=seed) > 0
    packed = pack_signs(positive)
    signs = torch.where(positive, 1.0, -1.0)
    assert torch.equal(unpack_signs(packed)[:, :num_vectors], signs)
    places = torch.arange(num_vectors)
    assert torch.equal(signs_at(packed[0, places // 16], places % 16), signs[0])


@given(bits, dims, seeds)
def test_inner_products_over_many_pairs_have_no_bias(num_bits: int, dim: int, seed: int) -> None:
    num_pairs, turn = 10_000, rotation(dim)
    directions = normalize(rows(num_pairs, dim, seed=seed), dim=-1)
    # Queries lean towards their vectors, so that codes which are too short would show.
    query = normalize(directions + rows(num_pairs, dim, seed=seed + 1) / math.sqrt(dim), dim=-1)
    lengths = lengths_of(num_pairs, seed + 2)
    numbers, scale = quantise(directions * lengths @ turn, num_bits, unbiased=True)
    products = (query @ turn * (numbers - middle(num_bits))).sum(-1) * scale.float()
    errors = products / lengths.squeeze(1) - (query * directions).sum(-1)
    assert abs(float(errors.mean())) < 6 * float(errors.std()) / math.sqrt(num_pairs)


@given(bits, st.sampled_from([33, 64, 96, 128, 256]), seeds)
def test_inner_products_scatter_as_noise_says(num_bits: int, dim: int, seed: int) -> None:
    query, vectors = rows(1, 8, dim, seed=seed), rows(4000, dim, seed=seed + 1)
    codes = encode(vectors.unsqueeze(0), num_bits, unbiased=True)
    found = inner_products(query, codes, num_bits)
    length = codes.scale.float() * level_norm(num_bits, dim)
    expected = query.norm(dim=-1).unsqueeze(-1) * length * noise(num_bits, dim)
    scatter = ((found - query @ vectors.T) / expected).square().mean().sqrt()
    assert 0.9 < float(scatter) < 1.1


@given(bits, st.sampled_from([64, 80, 128, 256]), seeds)
def test_decoded_vectors_miss_what_theory_says(num_bits: int, dim: int, seed: int) -> None:
    vectors = rows(1, 2000, dim, seed=seed) * lengths_of(2000, seed + 1)
    codes = encode(vectors, num_bits, unbiased=False)
    missed = (decode(codes, num_bits, dim) - vectors).square().sum(-1)
    share = float((missed / vectors.square().sum(-1)).mean())
    assert share == pytest.approx(DISTORTION[num_bits], rel=0.05)


@given(bits, dims, seeds)
def test_decoded_vectors_are_scaled_for_the_least_error(num_bits: int, dim: int, seed: int) -> None:
    vectors = rows(1, 48, dim, seed=seed)
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
    assert torch.equal(found, torch.zeros(1, 4, 16))


@pytest.mark.parametrize("length", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("num_bits", [1, 2])
def test_a_vector_along_one_coordinate_is_found_again(num_bits: int, length: float) -> None:
    """Scenario: the worst direction for codes that were not rotated."""
    vector = torch.zeros(1, 1, 64)
    vector[..., 5] = length
    turn = rotation(64)
    codes = encode(vector @ turn, num_bits, unbiased=True)
    found = inner_products(vector @ turn, codes, num_bits)
    assert float(found[0, 0, 0]) == pytest.approx(length**2, rel=4e-3)
