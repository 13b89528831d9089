"""The simulation: nothing is lost or invented, and more of anything does what it should."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offload.bench.sim_cluster import simulate
from offload.bench.sim_machine import BOXES, Box
from offload.bench.sim_result import SimResult
from offload.bench.sim_trace import Trace, TraceRequest
from offload.bench.sim_workload import Workload, synthesize
from offload.errors import ConfigError

MIB = 1 << 20
BOX = Box(
    name="small",
    token_bytes=1024,
    device_bytes=64 * MIB,
    host_bytes=128 * MIB,
    disk_bytes=512 * MIB,
    bus_bytes_per_s=1e9,
    disk_read_bytes_per_s=2e8,
    disk_write_bytes_per_s=1e8,
    prefill_token_s=1e-4,
    prefill_pair_s=1e-9,
    decode_s=5e-3,
    decode_row_s=1e-4,
    request_s=1e-3,
)
WORKLOAD = Workload(sessions=60, sessions_per_s=2.0, think_s=5.0, max_tokens=16_000)
TRACE = synthesize(WORKLOAD)
LINKS = ("bus", "bus_out", "disk", "net_in", "net_out", "store_in", "store_out")

BLOCK_BYTES = 512 * BOX.token_bytes

boxes = st.builds(
    lambda device, host, disk, remote, is_blocking, is_choosy, idle_s: replace(
        BOX,
        device_bytes=device * MIB,
        host_bytes=host * MIB,
        disk_bytes=disk * MIB,
        remote_bytes=remote * MIB,
        is_blocking=is_blocking,
        is_choosy=is_choosy,
        idle_to_host_s=idle_s,
    ),
    st.sampled_from([16, 64, 256]),
    st.sampled_from([0, 32, 256]),
    st.sampled_from([0, 128, 1024]),
    st.sampled_from([0, 1024]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 2.0]),
)


@given(box=boxes, num_boxes=st.integers(1, 4), seed=st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_simulation_answers_every_request_once_and_counts_every_byte(
    box: Box, num_boxes: int, seed: int
) -> None:
    trace = synthesize(replace(WORKLOAD, sessions=15), seed)
    result = simulate(trace, box, num_boxes, "random" if seed % 2 else "affinity", seed)
    assert [each.index for each in result.outcomes] == list(range(len(trace.requests)))
    for each, asked in zip(result.outcomes, trace.requests, strict=True):
        assert asked.arrival_s <= each.arrival_s < each.first_s <= each.end_s
        assert 0 <= sum(each.hits.values()) < asked.input_tokens
    num_tokens = sum(each.output_tokens for each in trace.requests)
    assert sum(count for _, count in result.gaps) == num_tokens - len(trace.requests)
    check_bytes(result)


def check_bytes(result: SimResult) -> None:
    """Compare what links carried with the hits that were found."""
    counts = result.counts
    assert all(
        counts.num_bytes[name] == counts.num_operations[name] * BLOCK_BYTES for name in LINKS
    )
    # A prompt whose last token is computed in any case has read that token's block whole.
    blocks = {
        tier: sum(-(-each.hits[tier] // 512) for each in result.outcomes)
        for tier in ("host", "disk", "remote")
    }
    assert counts.num_operations["bus"] == sum(blocks.values())
    assert counts.num_operations["net_in"] == blocks["remote"]
    assert counts.num_operations["store_out"] == blocks["remote"]
    assert counts.num_operations["disk"] >= blocks["disk"]
    assert all(0 <= share <= 1 + 1e-9 for share in result.utilisation.values())


@pytest.mark.parametrize("routing", ["affinity", "random"])
def test_simulation_run_twice_gives_the_same(routing: str) -> None:
    first, second = (simulate(TRACE, BOX, 3, routing, seed=5) for _ in range(2))  # type: ignore[arg-type]
    assert first == second


@given(
    grown=st.sampled_from(["device_bytes", "host_bytes", "disk_bytes"]),
    factor=st.sampled_from([2, 4, 16]),
)
@settings(max_examples=9, deadline=None)
def test_hits_with_more_capacity_are_not_fewer(grown: str, factor: int) -> None:
    # Requests far apart, so that only capacity decides.
    trace = synthesize(replace(WORKLOAD, sessions=30, sessions_per_s=0.01, think_s=400.0))
    small = replace(BOX, device_bytes=24 * MIB, host_bytes=32 * MIB, disk_bytes=48 * MIB)
    large = replace(small, **{grown: factor * getattr(small, grown)})
    few, many = (sum(simulate(trace, box).hit_share.values()) for box in (small, large))
    assert many >= few


@given(
    speed=st.sampled_from(["decode_s", "prefill_token_s", "request_s"]),
    factor=st.floats(1.5, 10.0),
)
@settings(max_examples=9, deadline=None)
def test_span_with_slower_computation_is_not_shorter(speed: str, factor: float) -> None:
    trace = synthesize(replace(WORKLOAD, sessions=20, sessions_per_s=100.0))
    slow = replace(BOX, **{speed: factor * getattr(BOX, speed)})
    assert simulate(trace, slow).span_s >= simulate(trace, BOX).span_s


def test_load_that_grows_makes_waits_grow_and_compute_the_fullest_part() -> None:
    found = [simulate(TRACE.denser(load), BOX) for load in (0.1, 1.0, 10.0)]
    waits = [each.ttft_s(0.9) for each in found]
    assert waits == sorted(waits)
    assert found[-1].busiest == "compute"


def test_slow_disk_under_load_is_the_fullest_part() -> None:
    box = replace(BOX, disk_write_bytes_per_s=1e6)
    assert simulate(TRACE, box).busiest == "disk"


def test_sessions_that_stay_hit_more_than_those_routed_at_random() -> None:
    stay, stray = (
        sum(simulate(TRACE, BOX, 8, routing).hit_share.values())
        for routing in ("affinity", "random")
    )
    assert stay > stray + 0.1


def test_remote_tier_gives_sessions_that_stray_their_tokens_back() -> None:
    box = replace(BOX, remote_bytes=1 << 34, net_bytes_per_s=1e9)
    stray = simulate(TRACE, box, 8, "random")
    stay = simulate(TRACE, BOX, 8, "affinity")
    assert sum(stray.hit_share.values()) >= 0.95 * sum(stay.hit_share.values())


def test_remote_tier_that_is_slower_than_prefill_is_not_read() -> None:
    box = replace(BOX, remote_bytes=1 << 34, net_bytes_per_s=1e6)
    assert simulate(TRACE, box, 8, "random").hit_share["remote"] < 0.01
    careless = replace(box, is_choosy=False)
    assert simulate(TRACE, careless, 8, "random").hit_share["remote"] > 0.1


def test_blocks_unused_for_longer_than_the_idle_times_are_found_further_down() -> None:
    turns = [TraceRequest(float(at), 1024, 1, (1, 2), 0) for at in (0, 3, 8, 28)]
    box = replace(BOX, idle_to_host_s=4.0, idle_to_disk_s=10.0, is_choosy=False)
    found = [each.hits for each in simulate(Trace(tuple(turns)), box).outcomes]
    assert [max(hits, key=lambda tier: hits[tier]) for hits in found[1:]] == [
        "device",
        "host",
        "disk",
    ]


def test_request_of_a_session_is_asked_after_the_last_answer_has_ended() -> None:
    turns = [TraceRequest(0.0, 600, 100, (1, 2), 0), TraceRequest(0.01, 800, 5, (1, 3), 0)]
    first, second = simulate(Trace(tuple(turns)), BOX).outcomes
    assert second.arrival_s == first.end_s


def test_answer_waits_for_its_next_token_while_another_is_saved() -> None:
    short, long = (
        TraceRequest(0.0, 512, tokens, (session,), session)
        for session, tokens in enumerate((4, 40))
    )
    found = simulate(Trace((short, long), 512), replace(BOX, is_blocking=True, write_s=1.0))

    waits = [gap_s for gap_s, count in found.gaps for _ in range(count) if gap_s > 0.5]
    assert len(waits) == 1
    assert waits[0] > 1.0


def test_answers_side_by_side_take_one_step_together() -> None:
    box = replace(BOX, request_s=0.0, decode_row_s=0.0, prefill_pair_s=0.0)
    turns = [TraceRequest(0.0, 100, 11, (n,), n) for n in range(4)]
    outcomes = simulate(Trace(tuple(turns)), box).outcomes
    # Four pieces of 100 tokens, a step of the others after each, and the rest of the last answer.
    assert max(each.end_s for each in outcomes) == pytest.approx(4 * 0.01 + 13 * 0.005)


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ({"num_boxes": 0}, "at least 1"),
        ({"routing": "nearest"}, "routing 'nearest'"),
        ({"window_s": (1e6, 2e6)}, "no request arrives"),
        ({"box": replace(BOX, device_bytes=MIB)}, "a context of"),
        ({"trace": Trace(())}, "no requests"),
    ],
)
def test_simulation_of_the_impossible_is_refused(kind: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        simulate(**{"trace": TRACE, "box": BOX, **kind})  # type: ignore[arg-type]


def test_window_counts_what_arrives_in_it_only() -> None:
    result = simulate(TRACE, BOX, window_s=(10.0, 20.0))
    assert result.span_s == 10.0
    assert {math.floor(each.arrival_s / 10) for each in result.outcomes} == {1}


@pytest.mark.parametrize("name", sorted(BOXES))
def test_ready_box_written_as_json_is_read_back(name: str) -> None:
    assert Box.from_json(BOXES[name].to_json()) == BOXES[name]


@pytest.mark.parametrize("change", [{"decode_s": 0.0}, {"host_bytes": -1}, {"piece_tokens": 0}])
def test_box_of_impossible_numbers_is_refused(change: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        replace(BOX, **change)  # type: ignore[arg-type]
