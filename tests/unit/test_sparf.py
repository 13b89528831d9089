"""SparF: its compiled parts find what the plain ones do, and the whole is attention."""

from importlib.util import find_spec
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from torch import Tensor

from offload.errors import ConfigError
from offload.kernels import sparf, sparf_plain
from offload.kernels.reference import merge
from offload.types import Partial

Floats = NDArray[np.float32]

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
numbers = st.floats(-1000, 1000, width=32) | st.sampled_from([0.0, np.inf, -np.inf, np.nan, 1e-38])
key_shapes = hnp.array_shapes(min_dims=3, max_dims=3, max_side=40)
seeds = st.integers(0, 1000)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def exact(query: Tensor, keys: Tensor, values: Tensor) -> Partial:
    logits = (query.double() @ keys.double().mT).float()
    return Partial(logits.softmax(-1) @ values, logits.logsumexp(-1))


def addresses_of(codes: NDArray[np.int8]) -> NDArray[np.int64]:
    """Return where the runs of ``[..., num_tokens]`` begin."""
    starts = np.arange(codes.size // codes.shape[-1], dtype=np.int64) * codes.shape[-1]
    places: NDArray[np.int64] = (codes.ctypes.data + starts).reshape(codes.shape[:-1])
    return places


@given(hnp.arrays(np.float32, key_shapes, elements=numbers), st.sampled_from(DTYPES))
def test_codes_of_any_keys_are_those_of_the_definition(keys: Floats, dtype: torch.dtype) -> None:
    own = torch.from_numpy(keys).to(dtype)
    codes, scales = sparf.encode_channels(own)
    plain_codes, plain_scales = sparf_plain.encode_channels(own)
    np.testing.assert_array_equal(codes, plain_codes)
    np.testing.assert_array_equal(scales, plain_scales)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("num_tokens", "key_dim"), [(64, 128), (16, 16), (17, 24), (3, 80)])
def test_codes_of_keys_in_strided_rows_are_half_a_step_from_them(
    dtype: torch.dtype, num_tokens: int, key_dim: int
) -> None:
    keys = normal(2, num_tokens, key_dim + 8).to(dtype)[..., :key_dim]
    codes, scales = sparf.encode_channels(keys)
    decoded = codes * scales[..., None]
    away = np.abs(decoded - keys.float().mT.numpy())
    assert bool((away <= 0.5001 * scales[..., None]).all())
    np.testing.assert_allclose(scales, keys.float().abs().amax(1).numpy() / 127, rtol=1e-6)


def test_scale_of_keys_that_are_not_finite_is_that_of_the_others() -> None:
    keys = torch.tensor([[[1.0, torch.inf], [-2.0, -torch.inf], [torch.nan, 0.0]]])
    codes, scales = sparf.encode_channels(keys)
    assert codes.tolist() == [[[64, -127, 0], [0, 0, 0]]]
    np.testing.assert_allclose(scales, [[2 / 127, 0]], rtol=1e-6)


@given(st.lists(st.integers(1, 70), min_size=1, max_size=5), st.integers(1, 20), seeds)
def test_joined_codes_are_a_step_from_the_keys(lengths: list[int], dim: int, seed: int) -> None:
    spread = normal(len(lengths), dim, seed=seed).exp()
    spread[0] = 0
    keys = [
        normal(2, length, dim, seed=seed + place) * spread[place]
        for place, length in enumerate(lengths)
    ]
    parts = [sparf.encode_channels(part) for part in keys]
    codes, scales = sparf.join_codes(parts)
    plain = sparf_plain.join_codes([part.codes for part in parts], np.stack([p[1] for p in parts]))
    np.testing.assert_array_equal(codes, plain[0])
    np.testing.assert_array_equal(scales, plain[1])
    away = np.abs(codes * scales[..., None] - torch.cat(keys, 1).mT.numpy())
    assert bool((away <= 1.0001 * scales[..., None]).all())


@given(st.integers(1, 9), st.integers(1, 40), seeds)
def test_chosen_channels_have_the_largest_sums(num_queries: int, wanted: int, seed: int) -> None:
    query = normal(3, num_queries, 32, seed=seed).round().numpy()  # so that some are equal
    chosen, coverage = sparf.choose_channels(query, wanted)
    for head, size in enumerate(np.abs(query)):
        order = sorted(range(32), key=lambda i: (-size[:, i].sum(), i))
        assert chosen[head].tolist() == sorted(order[:wanted])
        inside, whole = size[:, chosen[head]].sum(1), size.sum(1)
        shares = np.where(inside > 0, inside / np.maximum(whole, 1e-30), 1)
        np.testing.assert_allclose(coverage[head], shares, rtol=1e-5)


@given(
    st.integers(1, 9),
    st.integers(1, 24),
    st.sampled_from([1, 5, 16, 24, 64, 80, 144]),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3)), max_size=8),
    seeds,
)
def test_approximate_logits_of_pieces_in_any_order_are_those_of_their_codes(
    num_queries: int,
    num_channels: int,
    piece_tokens: int,
    pieces: list[tuple[int, int]],
    seed: int,
) -> None:
    query = normal(2, num_queries, 24, seed=seed)
    channels, coverage = sparf.choose_channels(query.numpy(), num_channels)
    random = np.random.default_rng(seed)
    codes = random.integers(-127, 128, (3, 2, num_channels, 4 * piece_tokens), np.int8)
    scales = random.random((3, 2, num_channels), np.float32)
    block, column = np.array(pieces, np.int32).reshape(-1, 2).T
    places: tuple[Any, ...] = (addresses_of(codes), scales, block, column, piece_tokens)
    found = sparf.approximate(query.numpy(), channels, coverage, *places)
    plain = sparf_plain.approximate(query.numpy(), channels, coverage, *places)
    decoded = (codes * scales[..., None]).reshape(3, 2, num_channels, 4, piece_tokens)
    asked = np.take_along_axis(query.numpy(), channels[:, None], 2).astype(np.float64)
    keys = decoded[block, :, :, column].transpose(1, 2, 0, 3).reshape(2, num_channels, -1)
    expected = asked @ keys / np.sqrt(coverage)[..., None]
    np.testing.assert_allclose(found, expected, atol=2e-3)
    np.testing.assert_allclose(plain, expected, atol=2e-3)


def shares_of(logits: Floats, group_tokens: int) -> NDArray[np.float64]:
    """Return each group's share of the softmax of each query, ``[heads, queries, groups]``."""
    weights = torch.from_numpy(logits).double().softmax(-1)
    shares: NDArray[np.float64] = weights.unflatten(-1, (-1, group_tokens)).sum(-1).numpy()
    return shares


@pytest.mark.parametrize("kernels", ["plain", "compiled"])
@pytest.mark.parametrize("scale", [0.1, 3, 30, 1e30])
@pytest.mark.parametrize(("group_tokens", "num_all"), [(1, 90), (7, 11), (16, 200), (2000, 3)])
@pytest.mark.parametrize("num_groups", [1, 3, 1000])
def test_chosen_groups_have_most_of_the_softmax(
    kernels: str,
    scale: float,
    group_tokens: int,
    num_all: int,
    num_groups: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    choose_kernels(kernels, monkeypatch)
    logits = normal(2, 3, num_all * group_tokens, scale=scale).numpy()
    logits[:, :, ::5] = -np.inf
    groups, alpha = sparf.choose_groups(logits, group_tokens, num_groups)
    assert groups.shape == (2, min(num_groups, num_all))
    assert bool((np.diff(groups) > 0).all())
    shares = shares_of(logits, group_tokens)
    inside = np.take_along_axis(shares, groups[:, None], 2)
    best = np.sort(shares.sum(1))[:, -groups.shape[1] :]
    np.testing.assert_allclose(np.sort(inside.sum(1)), best, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(alpha, inside.sum(-1), rtol=1e-5, atol=1e-7)


def choose_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what is compiled, or what there is without numba."""
    if name == "plain":
        monkeypatch.setattr(sparf, "compiled", lambda name: None)
    elif find_spec("numba") is None:
        pytest.skip("compiled kernels need numba")


@pytest.mark.parametrize("kernels", ["plain", "compiled"])
def test_groups_of_logits_that_are_no_numbers_are_chosen_still(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_kernels(kernels, monkeypatch)
    logits = np.full((3, 2, 64), -np.inf, np.float32)
    logits[1] = np.nan
    logits[1, :, 40] = np.inf
    logits[2, 0, 17] = -3.4e38
    groups, alpha = sparf.choose_groups(logits, 16, 2)
    assert groups.tolist() == [[0, 1], [0, 2], [0, 1]]  # the first ones, where all are alike
    assert alpha.tolist() == [[0.5, 0.5], [1, 1], [1, 0.5]]


@given(seeds, st.floats(0.01, 1), st.integers(1, 30))
def test_groups_that_are_enough_are_as_few_as_that_takes(
    seed: int, least: float, most: int
) -> None:
    logits = normal(2, 3, 480, seed=seed, scale=3).numpy()
    groups, alpha = sparf.choose_groups(logits, 16, most, least)
    whole = sparf.choose_groups(logits, 16, most)
    fewer = sparf.choose_groups(logits, 16, max(1, groups.shape[1] - 1))
    assert groups.shape[1] == most or bool((alpha >= least * 0.9999).all())
    assert groups.shape[1] == 1 or bool((fewer.alpha < least * 1.0001).any())
    assert all(set(some) <= set(every) for some, every in zip(groups, whole.numbers, strict=True))


@pytest.mark.parametrize("num_tokens", [0, 15, 40])
def test_groups_that_are_not_whole_are_refused(num_tokens: int) -> None:
    with pytest.raises(ConfigError, match=f"of 16 tokens cannot be chosen from {num_tokens} "):
        sparf.choose_groups(np.zeros((1, 1, num_tokens), np.float32), 16, 1)


@given(st.integers(1, 5), st.sampled_from([8, 24, 128]), seeds)
def test_sparf_of_all_channels_and_groups_is_exact(num_queries: int, dim: int, seed: int) -> None:
    query = normal(2, num_queries, dim, seed=seed, scale=dim**-0.5)
    keys, values = normal(2, 96, dim, seed=seed + 1), normal(2, 96, 8, seed=seed + 2)
    found, truth = sparf.sparf(query, keys, values, dim, 6, 16), exact(query, keys, values)
    torch.testing.assert_close(found.out, truth.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.lse, truth.lse, atol=1e-5, rtol=1e-5)


@given(st.integers(1, 5), seeds)
def test_sparf_of_all_channels_has_the_lse_of_all_tokens_however_few_it_reads(
    num_groups: int, seed: int
) -> None:
    query, keys = normal(2, 4, 32, seed=seed, scale=0.3), normal(2, 160, 32, seed=seed + 1)
    values = normal(2, 160, 8, seed=seed + 2)
    halves = [
        sparf.sparf(query, keys[:, own], values[:, own], 32, num_groups, 16)
        for own in (slice(0, 96), slice(96, None))
    ]
    truth = exact(query, keys, values)
    torch.testing.assert_close(merge(halves).lse, truth.lse, atol=1e-4, rtol=1e-4)


@given(seeds)
def test_sparf_of_more_groups_reads_more_of_the_softmax(seed: int) -> None:
    logits = normal(2, 4, 480, seed=seed, scale=2).numpy()
    before = sparf.choose_groups(logits, 16, 1)
    for num_groups in range(2, 31):
        after = sparf.choose_groups(logits, 16, num_groups)
        assert bool((after.alpha >= before.alpha - 1e-6).all())
        before = after
    np.testing.assert_allclose(before.alpha, 1, rtol=1e-5)


@pytest.mark.parametrize("kernels", ["plain", "compiled"])
def test_attention_by_way_of_codes_is_that_of_the_algorithm(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_kernels(kernels, monkeypatch)
    query, keys = normal(2, 4, 64, scale=0.2), normal(2, 1024, 64, seed=1).sign()  # exact in codes
    query[:, :, 5:9] *= 8
    values = normal(2, 1024, 16, seed=2)
    found, alpha = attend_by_codes(query, keys, values, 8)
    truth = sparf.sparf(query, keys, values, 8, 12, 16)
    assert bool(((alpha > 0.2) & (alpha < 0.95)).all())
    torch.testing.assert_close(found.lse, truth.lse, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.out, truth.out, atol=1e-4, rtol=1e-4)


def attend_by_codes(
    query: Tensor, keys: Tensor, values: Tensor, num_channels: int
) -> tuple[Partial, Floats]:
    """Attend to 12 groups that codes in two blocks, each joined from two parts, point at."""
    parts = [sparf.encode_channels(part) for part in keys.split(256, 1)]
    blocks = [sparf.join_codes(parts[:2]), sparf.join_codes(parts[2:])]
    channels, coverage = sparf.choose_channels(query.numpy(), num_channels)
    runs = [np.take_along_axis(block.codes, channels[..., None], 1) for block in blocks]
    scales = np.stack([np.take_along_axis(block.scales, channels, 1) for block in blocks])
    block, column = np.divmod(np.arange(16), 8)
    addresses = np.stack([addresses_of(codes) for codes in runs])
    logits = sparf.approximate(
        query.numpy(), channels, coverage, addresses, scales, block, column, 64
    )
    groups, alpha = sparf.choose_groups(logits, 16, 12)
    tokens = torch.from_numpy(groups[..., None] * 16 + np.arange(16)).flatten(1).unsqueeze(-1)
    read = exact(query, keys.take_along_dim(tokens, 1), values.take_along_dim(tokens, 1))
    mean = values.mean(1).numpy()
    found: Any = sparf.finish(read.out.numpy(), read.lse.numpy(), alpha, mean)
    return Partial(*map(torch.from_numpy, found)), alpha
