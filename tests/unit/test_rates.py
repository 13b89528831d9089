import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import ConfigError
from offload.prefetch.rates import Cost, Rates

START = {"search": Cost(1e-3, 1e-6), "load.cpu": Cost(0.0, 1e-10)}


def make_rates() -> Rates:
    return Rates(START, token_bytes=4096, is_shared=False)


@pytest.mark.parametrize(("amount", "seconds"), [(0, 0.0), (-5, 0.0), (10, 7.0)])
def test_cost_of_an_amount_is_on_its_line_and_of_no_work_zero(
    amount: float, seconds: float
) -> None:
    assert Cost(2.0, 0.5).seconds(amount) == seconds


def test_rates_before_any_observation_are_those_measured_at_start() -> None:
    assert make_rates().costs() == START


@given(factor=st.floats(0.01, 100.0), amount=st.integers(1 << 15, 1 << 20))
def test_observe_of_one_size_again_and_again_converges_to_what_was_measured(
    factor: float, amount: int
) -> None:
    rates = make_rates()
    seconds = factor * START["search"].seconds(amount)
    for _ in range(1 + int(3.0 / START["search"].seconds(amount))):
        rates.observe("search", amount, seconds)
    assert rates.cost("search").seconds(amount) == pytest.approx(seconds, rel=0.01)


@given(amount=st.integers(1, 1 << 22), seconds=st.floats(0.0, 100.0))
def test_observe_moves_a_cost_towards_what_was_measured_and_never_beyond(
    amount: int, seconds: float
) -> None:
    rates = make_rates()
    before = rates.cost("search").seconds(amount)
    rates.observe("search", amount, seconds)
    low, high = sorted((before, max(seconds, 1e-9)))
    assert low * 0.999 <= rates.cost("search").seconds(amount) <= high * 1.001


def test_observe_of_one_kind_of_work_leaves_the_others_alone() -> None:
    rates = make_rates()
    rates.observe("search", 1 << 17, 5.0)
    assert rates.cost("load.cpu") == START["load.cpu"]


def test_observe_of_a_single_stall_hardly_counts() -> None:
    rates = make_rates()
    expected_s = START["search"].seconds(1000)
    rates.observe("search", 1000, 1000 * expected_s)
    assert rates.cost("search").seconds(1000) < 1.1 * expected_s


def test_observe_of_no_work_teaches_nothing() -> None:
    rates = make_rates()
    rates.observe("search", 0, 3.0)
    assert rates.costs() == START


@pytest.mark.parametrize(
    ("amount", "seconds"), [(-1, 1.0), (1, -1.0), (math.nan, 1.0), (1, math.inf), (math.inf, 1.0)]
)
def test_observe_of_what_cannot_have_been_measured_raises(amount: float, seconds: float) -> None:
    with pytest.raises(ConfigError, match="cannot have been measured"):
        make_rates().observe("search", amount, seconds)


def test_observe_of_unknown_work_raises_and_names_what_is_known() -> None:
    with pytest.raises(ConfigError, match=r"'attend.gpu', only of load.cpu, search"):
        make_rates().observe("attend.gpu", 1, 1.0)


@pytest.mark.parametrize("cost", [Cost(-1.0, 1.0), Cost(0.0, 0.0), Cost(0.0, math.inf)])
def test_rates_with_an_impossible_cost_raise(cost: Cost) -> None:
    with pytest.raises(ConfigError, match="search costs"):
        Rates({"search": cost}, 1, is_shared=False)


def test_observe_from_several_threads_loses_no_observation() -> None:
    together, alone = make_rates(), make_rates()
    gate = threading.Barrier(4)

    def observe(rates: Rates, times: int) -> None:
        for _ in range(times):
            rates.observe("search", 10_000, 0.1)

    def start_together() -> None:
        gate.wait(10.0)
        observe(together, 250)

    threads = [threading.Thread(target=start_together) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    observe(alone, 1000)
    assert together.cost("search").fixed_s == pytest.approx(alone.cost("search").fixed_s)
