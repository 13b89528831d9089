"""The compiled scan finds what the plain one does, and estimates the rest as it does.

It rounds queries to eight bits where it multiplies them with codes. The queries here are such that
this loses nothing, but for one test that shows how much it loses of others.
"""

import pytest
import torch
from torch import Tensor

from offload.index.residual import ResidualIndex
from offload.kernels.codes import rotation
from offload.kernels.reference import merge
from offload.kernels.scan import Scan, ScanTables, estimate_hits, scan
from offload.types import Partial

pytest.importorskip("numba", reason="compiled kernels need numba")
from offload.kernels import cpu_scan


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tables(num_tokens: int, key_dim: int, value_dim: int = 32, **options: object) -> ScanTables:
    keys, values = rows(2, num_tokens, key_dim), rows(2, num_tokens, value_dim, seed=1)
    return ResidualIndex.build(keys, values, **options).tables()


def both(own: ScanTables, query: Tensor, budget: int, group: str = "max") -> tuple[Scan, Scan]:
    assert cpu_scan.supports(own, query)
    return scan(own, query, budget, group), cpu_scan.scan(own, query, budget, group)  # type: ignore[arg-type]


def round_queries(num_queries: int, key_dim: int, unit: float = 4e-3) -> Tensor:
    """Return queries that are whole numbers of a unit when they are rotated, up to 127."""
    turned = (rows(2, num_queries, key_dim, seed=2) * 40).round().clamp(-127, 127)
    turned[..., 0] = 127
    return turned @ rotation(key_dim).T * unit


def estimate_all(own: ScanTables, found: Scan) -> Partial:
    """Return attention as estimated if none of the hits is read."""
    return merge([found.rest, estimate_hits(own, found, found.places >= 0)])


def assert_alike(own: ScanTables, plain: Scan, fast: Scan) -> None:
    for expected, found in zip(plain.places.tolist(), fast.places.tolist(), strict=True):
        wanted, have = set(expected) - {-1}, set(found) - {-1}
        assert len(have) == sum(place >= 0 for place in found), "a place twice"
        assert len(wanted) == len(have)
        assert len(wanted - have) <= 1, "more than a tie at the cut"
    assert fast.num_scanned == plain.num_scanned
    expected_all, found_all = estimate_all(own, plain), estimate_all(own, fast)
    torch.testing.assert_close(found_all.lse, expected_all.lse, atol=2e-3, rtol=0)
    # Weights of values are rounded to seven bits of the largest near them.
    torch.testing.assert_close(found_all.out, expected_all.out, atol=3e-2, rtol=0)
    torch.testing.assert_close(fast.squares, plain.squares, atol=1e-4, rtol=0.05)


@pytest.mark.parametrize("num_bits", [1, 2])
@pytest.mark.parametrize("num_queries", [1, 3, 4, 8])
@pytest.mark.parametrize("key_dim", [16, 40, 64, 128, 256])
def test_compiled_scan_finds_what_the_plain_one_does(
    key_dim: int, num_queries: int, num_bits: int
) -> None:
    own = tables(1500, key_dim, num_bits=num_bits)
    assert_alike(own, *both(own, round_queries(num_queries, key_dim), 40))


@pytest.mark.parametrize("num_tokens", [1, 5, 16, 17, 100, 1000, 8192 + 33, 2 * 8192 + 7])
def test_any_number_of_tokens_is_scanned(num_tokens: int) -> None:
    own = tables(num_tokens, 64)
    assert_alike(own, *both(own, round_queries(4, 64), max(1, num_tokens // 50)))


@pytest.mark.parametrize("value_dim", [8, 24, 64, 256])
def test_values_of_any_width_are_summed(value_dim: int) -> None:
    own = tables(600, 64, value_dim)
    assert_alike(own, *both(own, round_queries(4, 64), 20))


@pytest.mark.parametrize("group", ["max", "sum"])
def test_queries_of_a_group_agree_as_they_are_told(group: str) -> None:
    own = tables(900, 64)
    assert_alike(own, *both(own, round_queries(4, 64), 30, group))


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_any_share_of_the_tokens_is_scanned(share: float) -> None:
    own = tables(2000, 64)._replace(share=share)
    assert_alike(own, *both(own, round_queries(4, 64), 10))


def test_rounding_a_query_costs_less_than_the_codes_do() -> None:
    own, query = tables(2000, 128), rows(2, 4, 128, seed=2) / 4
    plain, fast = both(own, query, 40)
    torch.testing.assert_close(fast.lse(), plain.lse(), atol=0.04, rtol=0)
    noise = own.noise() * own.key_scale.float().mean() * query.norm(dim=-1).mean()
    assert noise > 0.15


def test_everything_found_leaves_nothing() -> None:
    own = tables(300, 64)
    plain, fast = both(own, rows(2, 4, 64, seed=2) / 4, 300)
    assert bool((fast.rest.lse == -torch.inf).all())
    assert bool((fast.rest.out == 0).all())
    assert [set(row) for row in fast.places.tolist()] == [set(row) for row in plain.places.tolist()]


def test_hits_come_with_the_best_first() -> None:
    _, fast = both(tables(3000, 64), rows(2, 1, 64, seed=2) / 2, 100)
    # The score is the logit, plus little; ranks are exact to a thousandth of the range.
    logits = fast.logits[:, 0]
    assert bool((logits[:, :10].mean(1) > logits[:, -10:].mean(1)).all())


def test_sharp_queries_whose_logits_lie_far_apart_are_summed_without_overflow() -> None:
    own = tables(800, 64)
    plain, fast = both(own, round_queries(4, 64, unit=4.0), 20)
    assert float(plain.lse().max()) > 200
    for expected, found in zip(plain.places.tolist(), fast.places.tolist(), strict=True):
        assert expected[0] in found
    assert bool(fast.rest.out.isfinite().all())
    torch.testing.assert_close(fast.lse(), plain.lse(), rtol=1e-3, atol=0.1)


def test_an_index_that_was_cut_is_scanned_as_one_that_was_never_longer() -> None:
    keys, values = rows(2, 8192 + 64, 64), rows(2, 8192 + 64, 64, seed=1)
    parts = [
        ResidualIndex.build(keys[:, cut], values[:, cut])
        for cut in (slice(8192), slice(8192, None))
    ]
    cut = ResidualIndex.join(parts).prefix(8192).tables()
    query = rows(2, 4, 64, seed=2) / 4
    whole, found = (
        cpu_scan.scan(parts[0].tables(), query, 50, "max"),
        cpu_scan.scan(cut, query, 50, "max"),
    )
    assert torch.equal(whole.places, found.places)
    assert torch.equal(whole.rest.out, found.rest.out)
    assert torch.equal(whole.logits, found.logits)


def test_threads_find_what_one_thread_does() -> None:
    own, query = tables(2000, 64), rows(2, 4, 64, seed=2) / 4
    before = torch.get_num_threads()
    found = []
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            found.append(cpu_scan.scan(own, query, 20, "max"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].places, found[1].places)
    assert torch.equal(found[0].rest.out, found[1].rest.out)
