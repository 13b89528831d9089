"""The cost model of the pipeline: its formulas, by hand."""

import math
from dataclasses import replace

import pytest
from hypothesis import given

from offload.errors import ConfigError
from offload.prefetch.pipeline import (
    RAW,
    CodecCost,
    LayerWork,
    Links,
    layer_seconds,
    stage_times,
    total_seconds,
)
from tests.support.pipelines import CODECS, LINKS, SHARES, WORK

WORK_BY_HAND = LayerWork(disk_bytes=80.0, host_bytes=20.0, num_reads=4, compute_s=3.0)
LINKS_BY_HAND = Links(disk_bytes_per_s=10.0, read_s=0.5, bus_bytes_per_s=50.0)
ON_HOST = CodecCost("zstd", ratio=2.0, decode_bytes_per_s=40.0)
ON_DEVICE = replace(ON_HOST, decodes_on="device")


def test_raw_chunks_take_their_bytes_over_every_link_and_no_decoding() -> None:
    times = stage_times(WORK_BY_HAND, LINKS_BY_HAND)
    assert times[:5] == (4 * 0.5 + 8.0, 0.0, 2.0, 3.0, 12.0)


@pytest.mark.parametrize(
    ("codec", "bus_s", "before_s"), [(ON_HOST, 2.0, 2 + 6 + 1 + 2), (ON_DEVICE, 1.6, 2 + 6 + 1.6)]
)
def test_encoded_chunks_take_fewer_bytes_over_the_links_before_the_decoder(
    codec: CodecCost, bus_s: float, before_s: float
) -> None:
    times = stage_times(WORK_BY_HAND, LINKS_BY_HAND, codec, share=0.5)
    assert times[:5] == pytest.approx((2 + 6.0, 1.0, bus_s, 3.0, before_s))


# Disk 4, decoder 2, compute 3, bus 2 if decoded before it and 1.2 if after.
@pytest.mark.parametrize(
    ("codec", "is_shared", "layers_ahead", "expected"),
    [
        (ON_HOST, False, 4, 4),
        (ON_DEVICE, False, 4, 2 + 3),
        (ON_HOST, True, 4, 2 + 2 + 3),
        (ON_DEVICE, True, 4, 1.2 + 2 + 3),
        (ON_HOST, False, 1, 4 + 2 + 2),
        (ON_DEVICE, False, 1, 4 + 1.2),
        (ON_HOST, True, 1, 4 + 2 + 2),
    ],
)
def test_layer_takes_as_long_as_its_slowest_lane(
    codec: CodecCost, is_shared: bool, layers_ahead: int, expected: float
) -> None:
    work = replace(WORK_BY_HAND, num_reads=0, layers_ahead=layers_ahead)
    links = replace(LINKS_BY_HAND, is_shared=is_shared)
    assert layer_seconds(work, links, codec, 1.0) == pytest.approx(expected)


def test_total_is_one_pass_through_all_stages_and_a_layer_time_for_each_further_layer() -> None:
    one_s = total_seconds(WORK_BY_HAND, LINKS_BY_HAND, 1)
    assert one_s == pytest.approx(10 + 2 + 3)
    assert total_seconds(WORK_BY_HAND, LINKS_BY_HAND, 5) == pytest.approx(one_s + 4 * 10)
    assert total_seconds(WORK_BY_HAND, LINKS_BY_HAND, 0) == 0.0


def test_total_counts_decoding_of_the_last_layer_on_the_device_once() -> None:
    on_device = total_seconds(WORK_BY_HAND, LINKS_BY_HAND, 1, ON_DEVICE, 0.5)
    assert on_device == pytest.approx(8 + 1.6 + 1 + 3)
    assert total_seconds(WORK_BY_HAND, LINKS_BY_HAND, 1, ON_HOST, 0.5) == pytest.approx(8 + 1 + 5)


@given(work=WORK, links=LINKS, codec=CODECS, share=SHARES)
def test_times_are_finite_and_a_layer_is_no_shorter_than_any_stage(
    work: LayerWork, links: Links, codec: CodecCost, share: float
) -> None:
    times = stage_times(work, links, codec, share)
    assert all(0 <= seconds < math.inf for seconds in (*times[:5], *times.lanes))
    assert times.layer_s >= max(times.disk_s, times.bus_s, times.decode_s, times.compute_s)
    assert total_seconds(work, links, 3, codec, share) >= 3 * times.compute_s


@given(work=WORK, links=LINKS, codec=CODECS, share=SHARES)
def test_lanes_are_straight_lines_over_the_share(
    work: LayerWork, links: Links, codec: CodecCost, share: float
) -> None:
    low, high = (stage_times(work, links, codec, end).lanes for end in (0.0, 1.0))
    on_lines = [a + share * (b - a) for a, b in zip(low, high, strict=True)]
    found = stage_times(work, links, codec, share).lanes
    assert found == pytest.approx(on_lines, rel=1e-9, abs=1e-9 * max(*low, *high))


@given(work=WORK, links=LINKS, codec=CODECS, share=SHARES)
def test_work_without_the_disk_takes_nothing_of_it(
    work: LayerWork, links: Links, codec: CodecCost, share: float
) -> None:
    times = stage_times(work.with_share_of_disk(0), links, codec, share)
    assert times.disk_s == times.decode_s == 0
    assert times.bus_s == work.host_bytes / links.bus_bytes_per_s


def test_raw_costs_the_same_whatever_share_is_called_raw() -> None:
    zero, one = (stage_times(WORK_BY_HAND, LINKS_BY_HAND, RAW, share) for share in (0.0, 1.0))
    assert zero == one


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="share"):
        stage_times(WORK_BY_HAND, LINKS_BY_HAND, ON_HOST, share)


@pytest.mark.parametrize("number", [-1.0, math.inf, math.nan])
@pytest.mark.parametrize("name", ["disk_bytes", "host_bytes", "num_reads", "compute_s"])
def test_work_that_is_no_amount_is_refused(name: str, number: float) -> None:
    with pytest.raises(ConfigError, match=name):
        replace(WORK_BY_HAND, **{name: number})  # type: ignore[arg-type]


def test_transfers_that_do_not_begin_before_their_layer_are_refused() -> None:
    with pytest.raises(ConfigError, match="0 layers ahead"):
        replace(WORK_BY_HAND, layers_ahead=0)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("disk_bytes_per_s", 0.0),
        ("bus_bytes_per_s", -1.0),
        ("bus_bytes_per_s", math.nan),
        ("read_s", -1.0),
        ("read_s", math.inf),
    ],
)
def test_links_of_impossible_speed_are_refused(name: str, number: float) -> None:
    with pytest.raises(ConfigError, match=str(number)):
        replace(LINKS_BY_HAND, **{name: number})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "number"), [("ratio", 0.0), ("decode_bytes_per_s", 0.0), ("error", -1.0)]
)
def test_codecs_of_impossible_cost_are_refused(name: str, number: float) -> None:
    with pytest.raises(ConfigError, match=name):
        replace(ON_HOST, **{name: number})  # type: ignore[arg-type]
