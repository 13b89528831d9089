"""What the pipeline compresses, with which codec, and what it leaves."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import ConfigError
from offload.prefetch.pipeline import RAW, CodecCost, LayerWork, Links, layer_seconds
from offload.prefetch.pipeline_plan import best_share, choose_codec, chunks_that_hide, plan_with
from tests.support.pipelines import CODECS, LINKS, SHARES, WORK

INT4 = CodecCost("int4", 16 / 4.5, math.inf, "device", error=0.1)
INT8 = CodecCost("int8", 2.0, math.inf, "device", error=0.01)
ZSTD = CodecCost("zstd", 1.45, math.inf, "host")

# LeoAM's motivating figure: a step computes for 100 ms and waits for the disk for 290 ms.
LEOAM_WORK = LayerWork(disk_bytes=290.0, host_bytes=0.0, num_reads=0, compute_s=100.0)
LEOAM_LINKS = Links(disk_bytes_per_s=1.0, read_s=0.0, bus_bytes_per_s=math.inf)


def with_disk_seconds(seconds: float) -> LayerWork:
    return replace(LEOAM_WORK, disk_bytes=seconds)


def test_four_bits_hide_the_transfers_of_the_papers_example_at_nine_tenths() -> None:
    plan = choose_codec(LEOAM_WORK, LEOAM_LINKS, [INT4])
    assert (plan.codec, plan.is_hidden) == (INT4, True)
    assert plan.share == pytest.approx(0.911, abs=1e-3)
    assert plan.times.layer_s == pytest.approx(100.0)


@pytest.mark.parametrize("read_s", [0.0, 0.2])
@pytest.mark.parametrize("decode_bytes_per_s", [3.0, 50.0, math.inf])
@pytest.mark.parametrize("disk_bytes", [50.0, 105.0, 150.0, 290.0, 400.0, 4000.0])
def test_share_where_the_disk_meets_a_decoding_device_is_the_closed_form(
    disk_bytes: float, decode_bytes_per_s: float, read_s: float
) -> None:
    work = replace(LEOAM_WORK, disk_bytes=disk_bytes, num_reads=100)
    links, codec = (
        replace(LEOAM_LINKS, read_s=read_s),
        replace(INT4, decode_bytes_per_s=decode_bytes_per_s),
    )
    beyond_s = 100 * read_s + disk_bytes - 100
    saved_s = disk_bytes * (1 - 1 / INT4.ratio) + disk_bytes / decode_bytes_per_s
    assert best_share(work, links, codec) == pytest.approx(min(max(beyond_s / saved_s, 0), 1))


@pytest.mark.parametrize("codec", [INT4, INT8, ZSTD], ids=lambda codec: codec.name)
def test_nothing_is_compressed_where_the_disk_hides_raw_chunks(codec: CodecCost) -> None:
    assert best_share(with_disk_seconds(99.0), LEOAM_LINKS, codec) == 0.0
    assert choose_codec(with_disk_seconds(99.0), LEOAM_LINKS, [codec]).codec is RAW


def test_nothing_is_compressed_where_the_bus_is_slower_whatever_the_disk_does() -> None:
    links = replace(LEOAM_LINKS, bus_bytes_per_s=0.5)
    assert best_share(LEOAM_WORK, links, ZSTD) == 0.0
    assert best_share(LEOAM_WORK, links, INT4) == 1.0  # decoded behind the bus, it helps there


def test_codec_that_decodes_slower_than_the_disk_reads_is_used_for_part_of_the_chunks() -> None:
    slow = replace(ZSTD, decode_bytes_per_s=1.0)
    share = best_share(LEOAM_WORK, LEOAM_LINKS, slow)
    # The decoder then takes as long as the disk: 290 x = 290 (1 − x + x / 1.45).
    assert share == pytest.approx(1 / (2 - 1 / 1.45))


def test_shared_cores_decode_in_the_time_of_compute() -> None:
    shared = replace(LEOAM_LINKS, is_shared=True)
    slow = replace(ZSTD, decode_bytes_per_s=10.0)
    apart_s, shared_s = (
        plan_with(LEOAM_WORK, links, slow).times for links in (LEOAM_LINKS, shared)
    )
    assert apart_s.layer_s == pytest.approx(200.0)
    assert apart_s.lanes[3] == 100.0
    assert shared_s.lanes[1] == pytest.approx(100.0 + 29.0)


@pytest.mark.parametrize(
    ("disk_s", "expected", "is_hidden"),
    [
        (90.0, "raw", True),
        (104.0, "raw", True),  # within the slack
        (140.0, "zstd", True),
        (200.0, "int8", True),
        (290.0, "int4", True),
        (500.0, "int4", False),
    ],
)
def test_least_lossy_codec_that_hides_is_chosen_else_the_fastest(
    disk_s: float, expected: str, is_hidden: bool
) -> None:
    plan = choose_codec(with_disk_seconds(disk_s), LEOAM_LINKS, [INT4, ZSTD, INT8])
    assert (plan.codec.name, plan.is_hidden) == (expected, is_hidden)


def test_codec_that_loses_more_is_not_chosen_for_a_gain_within_the_slack() -> None:
    hardly_better = replace(INT8, name="int7.8", ratio=2.05, error=0.02)
    plan = choose_codec(with_disk_seconds(1000.0), LEOAM_LINKS, [hardly_better, INT8])
    assert plan.codec is INT8
    plan = choose_codec(with_disk_seconds(1000.0), LEOAM_LINKS, [hardly_better, INT8], slack=0.0)
    assert plan.codec is hardly_better


def test_decoding_on_the_device_does_not_count_as_hidden() -> None:
    slow = replace(INT8, decode_bytes_per_s=2.0)
    plan = plan_with(LEOAM_WORK, LEOAM_LINKS, slow)
    assert plan.times.disk_s == pytest.approx(plan.times.compute_s + plan.times.decode_s)
    assert not plan.is_hidden


@pytest.mark.parametrize(
    ("disk_s", "codec", "expected"),
    [(1000.0, RAW, 10), (1000.0, INT8, 20), (1000.0, INT4, 35), (50.0, RAW, 100), (0.0, RAW, 100)],
)
def test_as_many_chunks_hide_as_the_disk_reads_while_the_device_computes(
    disk_s: float, codec: CodecCost, expected: int
) -> None:
    work = with_disk_seconds(disk_s)
    assert chunks_that_hide(work, LEOAM_LINKS, codec, 100, slack=0.0) == expected


def test_no_chunk_hides_where_even_the_hosts_bytes_do_not() -> None:
    work = replace(LEOAM_WORK, host_bytes=101.0)
    links = replace(LEOAM_LINKS, bus_bytes_per_s=1.0)
    assert chunks_that_hide(work, links, INT4, 100, slack=0.0) == 0


@pytest.mark.parametrize("num_chunks", [0, 1])
def test_chunks_that_hide_are_never_more_than_there_are(num_chunks: int) -> None:
    assert chunks_that_hide(with_disk_seconds(1.0), LEOAM_LINKS, RAW, num_chunks) == num_chunks


def test_a_negative_number_of_chunks_is_refused() -> None:
    with pytest.raises(ConfigError, match="-1 chunks"):
        chunks_that_hide(LEOAM_WORK, LEOAM_LINKS, RAW, -1)


@given(work=WORK, links=LINKS, codec=CODECS, other=SHARES)
def test_no_share_makes_a_layer_faster_and_no_smaller_one_as_fast_as_the_best(
    work: LayerWork, links: Links, codec: CodecCost, other: float
) -> None:
    best = best_share(work, links, codec)
    least_s = layer_seconds(work, links, codec, best)
    assert least_s <= layer_seconds(work, links, codec, other) * (1 + 1e-6)
    if other < best * (1 - 1e-6):
        assert layer_seconds(work, links, codec, other) >= least_s * (1 - 1e-6)


@given(work=WORK, links=LINKS, codecs=st.lists(CODECS, max_size=4), slack=st.floats(0, 0.5))
def test_choice_is_never_slower_than_raw_and_hides_whenever_some_codec_does(
    work: LayerWork, links: Links, codecs: list[CodecCost], slack: float
) -> None:
    plan = choose_codec(work, links, codecs, slack)
    plans = [plan_with(work, links, codec, slack) for codec in [RAW, *codecs]]
    assert plan.is_hidden == any(other.is_hidden for other in plans)
    least_s = min(other.times.layer_s for other in plans)
    limit_s = max(least_s, work.compute_s if plan.is_hidden else 0.0)
    assert plan.times.layer_s <= (1 + slack) * limit_s * (1 + 1e-9)
    if plan.is_hidden:
        better = [other for other in plans if other.codec.error < plan.codec.error]
        assert not any(other.is_hidden for other in better)


@given(work=WORK, links=LINKS, codec=CODECS, num_chunks=st.integers(1, 300))
def test_chunks_that_hide_do_and_one_more_does_not(
    work: LayerWork, links: Links, codec: CodecCost, num_chunks: int
) -> None:
    found = chunks_that_hide(work, links, codec, num_chunks)

    def hides(count: int) -> bool:
        return plan_with(work.with_share_of_disk(count / num_chunks), links, codec).is_hidden

    assert found == 0 or hides(found)
    assert found == num_chunks or not hides(found + 1)
