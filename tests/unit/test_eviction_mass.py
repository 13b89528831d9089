"""Policies that rank by attention: what they rank, what they remember."""

import pytest

from offload.errors import ConfigError
from offload.tiers.eviction import EvictionPolicy
from offload.tiers.eviction_cumulative import LeastCumulativeMass
from offload.tiers.eviction_mass import LeastMass
from offload.tiers.eviction_recurrence import LongestOverdue
from offload.types import ChunkId
from tests.contracts.eviction_contract import ids


def observe(policy: EvictionPolicy, *steps: dict[int, float]) -> None:
    for masses in steps:
        policy.observe({ChunkId(chunk): mass for chunk, mass in masses.items()})


def insert(policy: EvictionPolicy, *numbers: int) -> None:
    for chunk in ids(*numbers):
        policy.insert(chunk)


def test_least_mass_evicts_the_chunk_with_the_least_attention_first() -> None:
    policy = LeastMass()
    insert(policy, 0, 1, 2)
    observe(policy, {0: 0.3, 1: 0.1, 2: 0.6})
    assert policy.victims(3) == [1, 0, 2]


def test_least_mass_forgets_what_was_important_once_and_cumulative_mass_does_not() -> None:
    moving, cumulative = LeastMass(decay=0.5), LeastCumulativeMass()
    for policy in (moving, cumulative):
        insert(policy, 0, 1)
        observe(policy, {0: 0.9, 1: 0.1}, *[{1: 0.2}] * 3)
    assert moving.victims(2) == [0, 1]
    assert cumulative.victims(2) == [1, 0]


def test_least_mass_follows_attention_over_many_thousand_steps() -> None:
    policy = LeastMass(decay=0.5)
    insert(policy, 0, 1)
    observe(policy, *[{0: 0.9}] * 5000, *[{1: 0.5}] * 5)
    assert policy.victims(1) == [0]
    observe(policy, *[{0: 0.9}] * 5)
    assert policy.victims(1) == [1]


def test_least_mass_takes_a_newcomer_for_average_until_it_is_known() -> None:
    policy = LeastMass()
    insert(policy, 0, 1)
    observe(policy, *[{0: 0.5, 1: 0.1}] * 50)
    insert(policy, 2)
    assert policy.victims(3) == [1, 2, 0]
    observe(policy, *[{0: 0.5, 1: 0.1, 2: 0.0}] * 20)
    assert policy.victims(1) == [2]


@pytest.mark.parametrize("make_policy", [LeastMass, LeastCumulativeMass])
def test_chunk_that_comes_back_has_the_attention_of_before_and_of_meanwhile(
    make_policy: type[LeastMass],
) -> None:
    policy = make_policy()
    insert(policy, 0, 1)
    observe(policy, {0: 0.3, 1: 0.2})
    policy.remove(ChunkId(1))
    observe(policy, {1: 0.3})
    insert(policy, 1)
    assert policy.victims(2) == [0, 1]


def test_chunk_that_was_forgotten_comes_back_as_a_newcomer() -> None:
    policy = LeastCumulativeMass(num_ghosts=1)
    insert(policy, 0, 1, 2)
    observe(policy, {0: 0.9, 1: 0.8, 2: 0.4})
    policy.remove(ChunkId(1))
    policy.remove(ChunkId(0))
    insert(policy, 0, 1)
    # The mean of the latest masses, 0.7, is all there is to say about chunk 1.
    assert policy.victims(3) == [2, 1, 0]


def test_attention_of_nothing_leaves_the_order_as_it_is() -> None:
    policy = LeastMass()
    insert(policy, 0, 1)
    observe(policy, {0: 0.5, 1: 0.1})
    observe(policy, {1: 0.0}, {})
    assert policy.victims(2) == [1, 0]


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.1])
def test_decay_out_of_range_is_refused(decay: float) -> None:
    with pytest.raises(ConfigError, match="decay"):
        LeastMass(decay)


def test_overdue_chunk_goes_before_one_that_rests_for_longer_but_always_did() -> None:
    policy = LongestOverdue()
    insert(policy, 0, 1)
    # Chunk 0 comes back every sixth step, chunk 1 every second, until it stays away.
    observe(policy, {0: 1.0}, {}, {1: 1.0}, {}, {1: 1.0}, {}, {0: 0.5, 1: 0.5}, {}, {}, {}, {})
    assert policy.victims(2) == [1, 0]


def test_chunk_that_never_came_back_goes_before_one_that_is_expected() -> None:
    policy = LongestOverdue()
    insert(policy, 0)
    observe(policy, {}, {}, {0: 1.0})
    insert(policy, 1)
    observe(policy, {}, {})
    assert policy.victims(2) == [1, 0]


def test_little_attention_is_no_return() -> None:
    policy = LongestOverdue(high=2.0)
    insert(policy, 0, 1, 2)
    observe(policy, *[{0: 0.9, 1: 0.1, 2: 0.0}] * 3)
    assert policy.victims(3) == [1, 2, 0]


def test_rhythm_is_remembered_while_a_chunk_is_elsewhere() -> None:
    policy = LongestOverdue()
    insert(policy, 0, 1)
    observe(policy, {0: 1.0})
    policy.remove(ChunkId(0))
    observe(policy, {}, {}, {}, {0: 0.5, 1: 0.5})
    insert(policy, 0)
    observe(policy, {}, {})
    # Both are idle for two steps; chunk 0 has been for four before, chunk 1 too, since it came.
    observe(policy, {1: 1.0}, {})
    assert policy.victims(2) == [0, 1]


@pytest.mark.parametrize("high", [0.0, -1.0, float("inf"), float("nan")])
def test_threshold_that_is_none_is_refused(high: float) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        LongestOverdue(high)
