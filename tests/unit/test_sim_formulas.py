"""Formulas of scale, and the simulation where they hold."""

import random
import statistics
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.bench.scale_model import (
    Prices,
    Turn,
    demands_s,
    distinct_tokens,
    hit_tokens,
    mean_turn,
    most_turns_per_s,
    queue_s,
    reach_s,
)
from offload.bench.sim_cluster import simulate
from offload.bench.sim_machine import BOXES, Box
from offload.bench.sim_sweep import steady_window_s
from offload.bench.sim_tiers import Link
from offload.bench.sim_trace import Trace, TraceRequest
from offload.bench.sim_workload import Workload, synthesize
from offload.errors import ConfigError

# Quick to come to rest: sessions live for a minute and a half.
WORKLOAD = Workload(
    turns=5.0, think_s=20.0, first_tokens=3000.0, output_tokens=100.0, system_prompts=1
)
BOX = replace(BOXES["8b"], device_bytes=12 << 30, host_bytes=48 << 30, prefill_token_s=1e-4)


@pytest.mark.parametrize("utilisation", [0.3, 0.6, 0.8])
def test_wait_before_a_link_is_what_the_formula_says(utilisation: float) -> None:
    draw, link, now_s, waits = random.Random(1), Link(), 0.0, []
    for _ in range(30_000):
        now_s += draw.expovariate(utilisation)
        waits.append(link.begin_s(now_s) - now_s)
        link.use(now_s, 1.0)
    assert statistics.fmean(waits) == pytest.approx(queue_s(1.0, utilisation), rel=0.08)


@pytest.mark.parametrize("utilisation", [-0.1, 1.0, 2.0])
def test_wait_of_a_link_that_is_full_is_refused(utilisation: float) -> None:
    with pytest.raises(ConfigError, match="no mean wait"):
        queue_s(1.0, utilisation)


def test_request_alone_takes_as_long_as_its_parts() -> None:
    [alone] = simulate(Trace((TraceRequest(0.0, 5000, 50, tuple(range(10)), 0),)), BOX).outcomes
    assert alone.ttft_s == pytest.approx(BOX.request_s + BOX.prompt_s(5000))
    steps = sum(BOX.step_s(1, 5000 + n) for n in range(1, 50))
    assert alone.end_s - alone.first_s == pytest.approx(steps)


def test_answers_that_fill_the_batch_come_as_fast_as_the_formula_says() -> None:
    rows, size, answer = BOX.max_running, 64, 400
    requests = tuple(TraceRequest(0.0, size, answer, (n,), n) for n in range(rows))
    result = simulate(Trace(requests), BOX)
    begin_s = max(each.first_s for each in result.outcomes)
    took_s = max(each.end_s for each in result.outcomes) - begin_s
    expected = answer * BOX.step_s(rows, rows * (size + answer / 2))
    # While prompts were read, some had begun.
    assert took_s == pytest.approx(expected, rel=0.35)
    assert min(gap for gap, count in result.gaps if count > rows) == pytest.approx(
        BOX.step_s(rows, rows * (size + answer / 2)), rel=0.1
    )


@pytest.fixture(scope="module")
def turn() -> Turn:
    return mean_turn(WORKLOAD)


def test_mean_turn_is_that_of_the_trace(turn: Turn) -> None:
    requests = synthesize(replace(WORKLOAD, sessions=3000)).requests
    mean = statistics.fmean(each.input_tokens for each in requests)
    assert mean == pytest.approx(turn.input_tokens, rel=0.03)


@pytest.mark.parametrize("share", [0.3, 0.7])
def test_hits_and_work_of_the_simulation_are_those_of_the_formulas(
    turn: Turn, share: float
) -> None:
    most, part = most_turns_per_s(BOX, turn)
    rate = share * most / WORKLOAD.turns
    workload = replace(WORKLOAD, sessions=int(rate * 600), sessions_per_s=rate)
    trace = synthesize(workload, seed=2)
    result = simulate(trace, BOX, window_s=steady_window_s(trace))
    load = len(result.outcomes) / result.span_s
    expected = hit_tokens(BOX, turn, load)
    for tier in ("device", "host"):
        assert result.hit_share[tier] == pytest.approx(expected[tier] / turn.input_tokens, abs=0.08)
    assert sum(result.hit_share.values()) == pytest.approx(
        sum(expected.values()) / turn.input_tokens, abs=0.05
    )
    work = load * demands_s(BOX, turn, expected)[part]
    assert result.utilisation[part] == pytest.approx(work, rel=0.12)


@pytest.mark.parametrize(("load", "is_full"), [(0.8, False), (1.3, True)])
def test_compute_is_full_from_the_load_on_that_the_formula_says(
    turn: Turn, load: float, is_full: bool
) -> None:
    most, part = most_turns_per_s(BOX, turn)
    rate = load * most / WORKLOAD.turns
    trace = synthesize(replace(WORKLOAD, sessions=int(rate * 400), sessions_per_s=rate), seed=2)
    result = simulate(trace, BOX, window_s=steady_window_s(trace))
    assert result.busiest == part == "compute"
    assert (result.utilisation["compute"] > 0.95) == is_full


def test_disk_that_is_too_slow_is_full_first_and_as_soon_as_the_formula_says(turn: Turn) -> None:
    box = replace(BOX, disk_write_bytes_per_s=2e8)
    most, part = most_turns_per_s(box, turn)
    rate = 0.8 * most / WORKLOAD.turns
    trace = synthesize(replace(WORKLOAD, sessions=int(rate * 1000), sessions_per_s=rate), seed=2)
    result = simulate(trace, box, window_s=steady_window_s(trace))
    assert result.busiest == part == "disk"
    load = len(result.outcomes) / result.span_s
    assert result.utilisation["disk"] == pytest.approx(load / most, rel=0.12)


@given(capacity=st.floats(1e4, 1e9), load=st.floats(0.01, 100.0))
@settings(deadline=None)
def test_reach_of_a_tier_is_where_distinct_tokens_fill_it(capacity: float, load: float) -> None:
    turn = mean_turn(WORKLOAD)
    assert distinct_tokens(turn, load, reach_s(turn, load, capacity)) == pytest.approx(capacity)


@given(load=st.floats(0.01, 100.0), factor=st.integers(1, 16))
@settings(deadline=None)
def test_hits_are_never_more_than_what_is_reused_and_grow_with_the_disk(
    load: float, factor: int
) -> None:
    turn = mean_turn(WORKLOAD)
    larger = replace(BOX, disk_bytes=factor * BOX.disk_bytes)
    few, many = (sum(hit_tokens(box, turn, load).values()) for box in (BOX, larger))
    assert few <= many + 1e-9
    assert many <= turn.reused_tokens + turn.shared_tokens + 1e-9


def test_store_that_all_share_is_full_first_where_boxes_are_many(turn: Turn) -> None:
    box = replace(BOX, remote_bytes=1 << 50, store_bytes_per_s=1e11)
    parts = {boxes: most_turns_per_s(box, turn, boxes) for boxes in (1, 1000)}
    assert [part for _, part in parts.values()] == ["compute", "store_in"]
    assert parts[1000][0] < parts[1][0]


def test_price_of_a_million_tokens_is_bytes_times_price() -> None:
    box: Box = replace(BOX, token_bytes=1 << 30, prefill_s=0.0, prefill_pair_s=0.0)
    prices = Prices(box_usd_per_hour=3.6, disk=0.5)
    assert prices.kept_usd(box.token_bytes, "disk") == 0.5e6
    assert prices.computed_usd(box, 1000) == pytest.approx(1e6 * 1e-4 * 3.6 / 3600)
    month_s = 730 * 3600
    assert prices.break_even_s(box, "disk", 1000) == pytest.approx(0.1 / 0.5e6 * month_s)


def test_prices_below_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="below 0"):
        Prices(disk=-1.0)
