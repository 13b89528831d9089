"""The replay of placements: nothing is lost, and the limit is one."""

from collections.abc import Callable
from functools import cache, partial
from itertools import combinations

import pytest
import torch

from benchmarks.placement import POLICIES, cake_shares, make_trace, measure
from benchmarks.placement_replay import (
    DEVICE,
    DISK,
    HOST,
    Farthest,
    Tally,
    Tiers,
    Trace,
    mean_tally,
    replay,
)
from offload.tiers.eviction import EvictionPolicy, LeastRecentlyUsed
from offload.tiers.eviction_admission import SecondHit
from offload.tiers.eviction_mass import LeastMass


def random_trace(
    seed: int, num_steps: int = 40, num_layers: int = 2, num_chunks: int = 12, num_read: int = 2
) -> Trace:
    """Return attention that wanders: each step is close to the one before."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randn(num_steps, num_layers, num_chunks, generator=generator)
    return Trace((2 * steps.cumsum(0)).softmax(-1), num_read)


def optimal_hits(trace: Trace, capacity: int) -> int:
    """Return the most reads that any fixed number of chunks can hit, by trying all of them."""
    reads = [set(trace.read(step)) for step in range(trace.num_steps)]

    @cache
    def most(step: int, held: frozenset[int]) -> int:
        if step == len(reads):
            return 0
        choices = combinations(sorted(held | reads[step]), capacity)
        return len(reads[step] & held) + max(most(step + 1, frozenset(c)) for c in choices)

    start = frozenset(range(trace.num_chunks - capacity, trace.num_chunks))
    return most(0, start)


@pytest.mark.parametrize("seed", range(5))
def test_farthest_finds_as_much_on_the_device_as_anything_can(seed: int) -> None:
    trace = random_trace(seed, num_steps=14, num_layers=1, num_chunks=7, num_read=1)
    tally = replay(trace, Tiers(7, [3, 0], partial(Farthest, trace)), 0)
    assert round(tally.device * 14) == optimal_hits(trace, 3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", POLICIES)
def test_no_policy_finds_more_than_the_limit(name: str, seed: int) -> None:
    trace = random_trace(seed)
    found, limit = (
        replay(trace, Tiers(24, [3, 5], make_policy), 5)
        for make_policy in (POLICIES[name], partial(Farthest, trace))
    )
    assert found.device <= limit.device
    assert found.disk_chunks >= limit.disk_chunks


@pytest.mark.parametrize("admission", [None, SecondHit(3)], ids=["first hit", "second hit"])
@pytest.mark.parametrize("make_policy", POLICIES.values(), ids=POLICIES)
def test_tiers_are_full_and_every_chunk_is_in_one_of_them(
    make_policy: Callable[[], EvictionPolicy], admission: SecondHit | None
) -> None:
    trace = random_trace(1)
    tiers = Tiers(24, [3, 5], make_policy, admission)
    for step in range(trace.num_steps):
        read = trace.read(step)
        tiers.step(read, dict.fromkeys(read, 0.1))
        held = [{c for c, at in tiers.level.items() if at == level} for level in (DEVICE, HOST)]
        assert [len(chunks) for chunks in held] == [3, 5]
        assert [set(policy.victims(99)) for policy in tiers.policies] == held


def test_chunks_that_are_read_at_every_step_stay_on_the_device() -> None:
    masses = torch.full((10, 1, 20), 0.01)
    masses[:, :, :2] = 0.4
    trace = Trace(masses, num_read=2)
    tally = replay(trace, Tiers(20, [2, 4], LeastRecentlyUsed), 1)
    assert (tally.device, tally.host, tally.disk_chunks, tally.moved_chunks) == (1, 0, 0, 0)
    assert tally.mass == pytest.approx((2 * 0.4 + 4 * 0.01) / (2 * 0.4 + 18 * 0.01))


def test_chunks_of_less_attention_do_not_displace_those_of_more() -> None:
    masses = torch.full((30, 1, 6), 0.01)
    masses[:, 0, 0] = 0.5
    masses[1::2, 0, 1], masses[2::2, 0, 2] = 0.2, 0.2
    trace = Trace(masses, num_read=2)
    by_mass, by_time = (
        replay(trace, Tiers(6, [1, 1], p), 4) for p in (LeastMass, LeastRecentlyUsed)
    )
    assert by_mass.device == 0.5
    assert by_mass.moved_chunks <= by_time.moved_chunks


def test_second_hits_move_fewer_chunks() -> None:
    trace = random_trace(2)
    every, second = (
        replay(trace, Tiers(24, [3, 5], LeastRecentlyUsed, rule), 5) for rule in (None, SecondHit())
    )
    assert second.moved_chunks < every.moved_chunks


def test_level_of_a_new_chunk_is_the_higher_the_later_it_was_written() -> None:
    tiers = Tiers(5, [1, 2], LeastRecentlyUsed)
    assert list(tiers.level.values()) == [DISK, DISK, HOST, HOST, DEVICE]


def test_mean_tally_is_the_mean_of_every_figure() -> None:
    assert mean_tally([Tally(1, 0, 2, 1, 4), Tally(0, 1, 4, 0, 0)]) == Tally(0.5, 0.5, 3, 0.5, 2)


def test_benchmark_measures_every_policy_and_shares_that_add_up() -> None:
    trace = make_trace(2048, 12, num_layers=4, share=0.1, seed=0)
    assert trace.masses.shape == (12, 4, 30)
    assert float(trace.masses.sum(-1).max()) <= 1 + 1e-5
    shares = cake_shares(trace, 6)
    assert sum(shares) == pytest.approx(1)
    assert min(shares) >= 0.25 / 4
    tallies = dict(measure(trace, 6))
    assert len(tallies) == 2 * len(POLICIES) + 2
    assert all(0 < tally.mass < 1 for tally in tallies.values())
    assert tallies["limit: Belady"].device == max(tally.device for tally in tallies.values())
