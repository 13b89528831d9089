import math
from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.prefetch.planner import (
    Split,
    break_even_tokens,
    choose_attention,
    dense_seconds,
    one_by_one,
    pipelined,
    plan_step,
    plan_tiers,
    split_units,
)
from offload.prefetch.rates import Cost, Rates

TOKEN_BYTES = 4096

costs = st.builds(Cost, st.floats(0.0, 1e-2), st.floats(1e-9, 1e-2))
counts = st.integers(0, 200)
tokens = st.integers(0, 1 << 21)


@dataclass(frozen=True)
class Machine:
    """What it costs to attend on device and host, search and gather; links in bytes per second."""

    device: Cost
    host: Cost | None
    search: Cost | None
    gather: Cost
    bus: float
    disk: float
    is_shared: bool

    def rates(self) -> Rates:
        start = {
            "attend.gpu": self.device,
            "load.cpu": Cost(10e-6, 1 / self.bus),
            "load.disk": Cost(100e-6, 1 / self.disk),
            "gather.gpu": self.gather,
            "gather.cpu": self.gather,
            "gather.disk": Cost(200e-6, 4e-6),
        }
        if self.host is not None:
            start["attend.cpu"] = self.host
        if self.search is not None:
            start["search"] = self.search
        return Rates(start, TOKEN_BYTES, is_shared=self.is_shared)


GPU = Machine(
    device=Cost(20e-6, 1e-9),
    host=Cost(100e-6, 100e-9),
    search=Cost(100e-6, 0.2e-9),
    gather=Cost(20e-6, 200e-9),
    bus=50e9,
    disk=5e9,
    is_shared=False,
)

CORES = Machine(
    device=Cost(50e-6, 400e-9),
    host=Cost(50e-6, 400e-9),
    search=Cost(500e-6, 20e-9),
    gather=Cost(50e-6, 2e-6),
    bus=8e9,
    disk=5e9,
    is_shared=True,
)


@given(num=counts, fetch=costs, in_place=st.none() | costs, overlaps=st.booleans())
def test_split_of_units_is_the_fastest_of_all_and_names_no_more_than_there_are(
    num: int, fetch: Cost, in_place: Cost | None, overlaps: bool
) -> None:
    split = split_units(num, fetch, in_place, overlaps=overlaps)
    assert split.fetched + split.in_place == num
    assert min(split.fetched, split.in_place) >= 0

    def seconds(fetched: int) -> float:
        left = 0.0 if in_place is None else in_place.seconds(num - fetched)
        return max(fetch.seconds(fetched), left)

    allowed = [num] if in_place is None else range(num + 1) if overlaps else [0, num]
    assert split.seconds == pytest.approx(min(map(seconds, allowed)))


@given(num=counts, fetch=costs, in_place=costs, times=st.floats(1.0, 100.0))
def test_split_over_a_slower_link_is_slower_and_fetches_no_more(
    num: int, fetch: Cost, in_place: Cost, times: float
) -> None:
    slower = Cost(fetch.fixed_s, fetch.unit_s * times)
    before, after = (split_units(num, link, in_place) for link in (fetch, slower))
    assert after.seconds >= before.seconds
    assert after.fetched <= before.fetched + 1  # units are whole


@pytest.mark.parametrize(
    ("link", "host", "expected"),
    [
        (Cost(0.0, 1e-12), Cost(0.0, 1.0), Split(100, 0, 1e-10)),
        (Cost(0.0, 1.0), Cost(0.0, 1e-12), Split(0, 100, 1e-10)),
        (Cost(0.0, 1.0), Cost(0.0, 1.0), Split(50, 50, 50.0)),
        (Cost(0.0, 1.0), Cost(0.0, 3.0), Split(75, 25, 75.0)),
        (Cost(1e9, 1.0), Cost(0.0, 3.0), Split(0, 100, 300.0)),
        (Cost(0.0, math.inf), Cost(0.0, 3.0), Split(0, 100, 300.0)),
        (Cost(0.0, 2.0), None, Split(100, 0, 200.0)),
    ],
)
def test_split_between_extremes_and_equals_is_as_computed_by_hand(
    link: Cost, host: Cost | None, expected: Split
) -> None:
    assert split_units(100, link, host) == pytest.approx(expected)


def test_split_of_work_that_does_not_overlap_goes_one_way_as_a_whole() -> None:
    assert split_units(100, Cost(0.0, 2.0), Cost(0.0, 3.0), overlaps=False) == (100, 0, 200.0)


@given(first=costs, then=costs, amount=st.integers(1, 1000))
def test_cost_of_a_pipeline_is_no_more_than_of_one_after_the_other(
    first: Cost, then: Cost, amount: int
) -> None:
    fast = pipelined(first, then).seconds(amount)
    slow = one_by_one(first, then).seconds(amount)
    assert max(first.seconds(amount), then.seconds(amount)) <= fast <= slow * (1 + 1e-9)


@given(gpu=tokens, cpu=tokens, disk=tokens, is_shared=st.booleans())
def test_plan_of_tiers_uses_each_token_once_where_it_can(
    gpu: int, cpu: int, disk: int, is_shared: bool
) -> None:
    wanted = {"gpu": gpu, "cpu": cpu, "disk": disk}
    plan = plan_tiers(wanted, replace(GPU, is_shared=is_shared).rates())
    assert {tier: split.fetched + split.in_place for tier, split in plan.items()} == wanted
    assert plan["gpu"].fetched == 0  # it is there
    assert plan["disk"].in_place == 0  # nobody can attend on the disk


@pytest.mark.parametrize(
    ("machine", "fetches", "attends"),
    [
        (GPU, True, True),
        (replace(GPU, bus=1e15, device=Cost(20e-6, 1e-12)), True, False),
        (replace(GPU, bus=1e3), False, True),
        (replace(GPU, host=None, bus=1e3), True, False),
        (CORES, False, True),
    ],
    ids=["both", "fast-bus", "slow-bus", "no-host", "cores"],
)
def test_plan_of_what_the_host_holds_goes_where_it_is_cheaper(
    machine: Machine, fetches: bool, attends: bool
) -> None:
    split = plan_tiers({"cpu": 100_000}, machine.rates())["cpu"]
    assert ((split.fetched > 0), (split.in_place > 0)) == (fetches, attends)


@given(
    held=st.fixed_dictionaries({"gpu": tokens, "cpu": tokens, "disk": tokens}),
    name=st.sampled_from(["bus", "disk"]),
    times=st.floats(1.0, 1000.0),
    is_shared=st.booleans(),
)
def test_dense_step_with_a_faster_link_is_never_slower(
    held: dict[str, int], name: str, times: float, is_shared: bool
) -> None:
    machine = replace(GPU, is_shared=is_shared)
    faster = replace(machine, **{name: getattr(machine, name) * times})
    assert dense_seconds(held, faster.rates()) <= dense_seconds(held, machine.rates()) * (1 + 1e-9)


@given(
    held=st.fixed_dictionaries({"gpu": tokens, "cpu": tokens, "disk": tokens}),
    tier=st.sampled_from(["gpu", "cpu", "disk"]),
    more=st.integers(0, 1 << 20),
    machine=st.sampled_from([GPU, CORES]),
)
def test_dense_step_over_more_tokens_is_never_faster(
    held: dict[str, int], tier: str, more: int, machine: Machine
) -> None:
    longer = {**held, tier: held[tier] + more}
    rates = machine.rates()
    assert dense_seconds(held, rates) <= dense_seconds(longer, rates) * (1 + 1e-9)


def test_dense_step_on_shared_cores_adds_up_and_overlaps_only_the_disk() -> None:
    rates = CORES.rates()
    attend_s = rates.cost("attend.gpu").seconds(30_000)
    assert dense_seconds({"gpu": 10_000, "cpu": 20_000}, rates) == pytest.approx(attend_s)
    disk_s = 10_000 * TOKEN_BYTES / CORES.disk
    both = dense_seconds({"cpu": 20_000, "disk": 10_000}, rates)
    assert max(disk_s, attend_s) <= both < disk_s + attend_s


@given(num=tokens, budget=tokens, machine=st.sampled_from([GPU, CORES]))
def test_step_takes_the_cheaper_way(num: int, budget: int, machine: Machine) -> None:
    plan = plan_step(num, budget, machine.rates())
    assert plan.seconds == (plan.dense_s if plan.attention == "dense" else plan.sparse_s)
    assert plan.seconds <= min(plan.dense_s, plan.sparse_s)


@given(num=tokens, budget=tokens, more=tokens)
def test_sparse_step_with_a_larger_budget_is_never_faster_nor_beyond_the_context(
    num: int, budget: int, more: int
) -> None:
    rates = CORES.rates()
    small, large = (plan_step(num, tokens, rates).sparse_s for tokens in (budget, budget + more))
    assert small <= large
    assert large <= plan_step(num, num, rates).sparse_s


@pytest.mark.parametrize(
    ("machine", "num_context", "expected"),
    [
        (CORES, 0, "dense"),
        (CORES, 500, "dense"),
        (CORES, 1 << 17, "sparse"),
        (replace(CORES, search=None), 1 << 17, "dense"),
        (replace(CORES, search=Cost(0.0, 1e-3)), 1 << 17, "dense"),
        (replace(CORES, device=Cost(1.0, 1e-9)), 500, "sparse"),
    ],
    ids=["nothing", "short", "long", "no-index", "slow-index", "slow-device"],
)
def test_attention_is_dense_exactly_where_searching_costs_more(
    machine: Machine, num_context: int, expected: str
) -> None:
    assert choose_attention(num_context, num_context // 100, machine.rates()) == expected


def test_attention_over_the_disk_is_sparse_where_over_memory_it_is_dense() -> None:
    rates = CORES.rates()
    assert choose_attention(1000, 10, rates) == "dense"
    assert choose_attention(1000, 10, rates, {"disk": 1000, "gpu": 0}) == "sparse"


@given(budget=st.floats(0.001, 0.2) | st.integers(1, 4096), limit=st.integers(1, 1 << 20))
def test_break_even_length_is_the_last_that_is_dense(budget: float | int, limit: int) -> None:
    rates = CORES.rates()
    found = break_even_tokens(budget, rates, limit)
    assert 0 <= found <= limit

    def chosen(num: int) -> str:
        read = budget if isinstance(budget, int) else max(1, int(budget * num))
        return choose_attention(num, read, rates)

    assert chosen(found) == "dense"
    assert found == limit or chosen(found + 1) == "sparse"


def test_break_even_length_falls_when_dense_attention_gets_slower() -> None:
    rates = CORES.rates()
    before = break_even_tokens(0.01, rates)
    for _ in range(100):
        rates.observe("attend.gpu", 10_000, 10 * CORES.device.seconds(10_000))
    assert break_even_tokens(0.01, rates) < before
