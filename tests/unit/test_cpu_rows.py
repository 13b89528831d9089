"""Rows named by their addresses are attended and copied as plain torch would."""

import pytest
import torch
from torch import Tensor

from offload.kernels import dispatch, reference, rows

pytest.importorskip("numba", reason="compiled kernels need numba")
from offload.kernels import cpu_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random_rows(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def addresses_of(pool: Tensor, wanted: Tensor) -> Tensor:
    """Return where rows of ``[num_rows, row_dim]`` are; 0 for negative numbers."""
    places = pool.data_ptr() + wanted * pool.stride(0) * pool.itemsize
    return places.masked_fill(wanted < 0, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_queries", [1, 2, 4, 7, 8])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(16, 16), (64, 64), (128, 128), (96, 32)])
def test_scattered_rows_are_attended(
    dtype: torch.dtype, num_queries: int, key_dim: int, value_dim: int
) -> None:
    pool = random_rows(500, key_dim + value_dim, dtype=dtype)
    wanted = torch.randint(-100, 500, (3, 130), generator=torch.Generator().manual_seed(1))
    query = random_rows(3, num_queries, key_dim, seed=2) / 4
    places = addresses_of(pool, wanted)
    plain = rows.attend_rows(query, places, 1, value_dim, dtype)
    fast = cpu_rows.attend_rows(query, places, 1, value_dim, dtype)
    torch.testing.assert_close(fast.out, plain.out, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(fast.lse, plain.lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("num_hits", [0, 1, 64, 65])
def test_heads_without_rows_have_no_weight(num_hits: int) -> None:
    pool = random_rows(100, 32)
    wanted = torch.full((2, num_hits), -1)
    wanted[1] = torch.arange(num_hits)
    fast = cpu_rows.attend_rows(
        random_rows(2, 4, 16), addresses_of(pool, wanted), 1, 16, pool.dtype
    )
    assert bool((fast.lse[0] == -torch.inf).all())
    assert bool((fast.out[0] == 0).all())
    assert bool(fast.lse[1].isfinite().all()) == (num_hits > 0)


def test_logits_far_apart_are_attended_without_overflow() -> None:
    pool, query = random_rows(300, 64), random_rows(1, 4, 32, seed=2) * 50
    places = addresses_of(pool, torch.arange(300).unsqueeze(0))
    plain = rows.attend_rows(query, places, 1, 32, pool.dtype)
    fast = cpu_rows.attend_rows(query, places, 1, 32, pool.dtype)
    torch.testing.assert_close(fast.out, plain.out, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_rows_are_copied(dtype: torch.dtype) -> None:
    pool = random_rows(50, 24, dtype=dtype)
    wanted = torch.tensor([[3, -1, 49], [0, 3, -1]])
    found = dispatch.read_rows(addresses_of(pool, wanted), 24, dtype)
    expected = pool[wanted.clamp_min(0)].masked_fill((wanted < 0).unsqueeze(-1), 0)
    assert torch.equal(found, expected)
    plain, have = rows.read_rows(addresses_of(pool, wanted), 1, 24, dtype)
    assert torch.equal(plain, expected)
    assert torch.equal(have, wanted >= 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "group", "num_queries"), [(1, 1, 1), (2, 4, 1), (1, 4, 4)])
@pytest.mark.parametrize("num_chunks", [1, 5])
def test_chunks_of_a_pool_are_attended_where_they_are(
    dtype: torch.dtype, batch: int, group: int, num_queries: int, num_chunks: int
) -> None:
    pool = random_rows(batch * 12, 2, 16, 64, dtype=dtype)
    chunks = pool.view(batch, 12, 2, 16, 64)[:, 1 : 2 * num_chunks : 2]
    keys, values = chunks.split(32, -1)
    query = random_rows(batch, 2 * group, num_queries, 32, dtype=dtype, seed=2)
    assert cpu_rows.attends_chunks(query, keys, values)
    fast = dispatch.partial_attention(query, keys, values, scale=0.2)
    plain = reference.partial_attention(query.double(), keys.double(), values.double(), scale=0.2)
    torch.testing.assert_close(fast.out, plain.out.float(), atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(fast.lse, plain.lse.float(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("change", ["many queries", "own tensors", "odd width", "another dtype"])
def test_what_does_not_lie_side_by_side_is_left_to_others(change: str) -> None:
    keys, values = random_rows(1, 3, 2, 16, 64).split(32, -1)
    query = random_rows(1, 4, 1, 32)
    if change == "many queries":
        query = random_rows(1, 4, 9, 32)
    if change == "own tensors":
        keys = keys.contiguous()
    if change == "odd width":
        keys, values = random_rows(1, 3, 2, 16, 40).split(20, -1)
        query = random_rows(1, 4, 1, 20)
    if change == "another dtype":
        query = query.bfloat16()
    assert not cpu_rows.attends_chunks(query, keys, values)
