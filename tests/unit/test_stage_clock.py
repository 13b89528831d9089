"""The clock of the stages: what it learns from measurements, and from which it learns nothing."""

import json
import math
import threading

import pytest

from offload.errors import ConfigError
from offload.prefetch.pipeline import CodecCost, Links
from offload.prefetch.stage_clock import StageClock

LINKS = Links(disk_bytes_per_s=1e9, read_s=1e-4, bus_bytes_per_s=2.0**33)
ZSTD = CodecCost("zstd", 1.5, 2.0**30)
INT4 = CodecCost("int4", 3.5, math.inf, "device", error=0.1)


def make_clock() -> StageClock:
    return StageClock(LINKS, [ZSTD, INT4])


def test_clock_that_saw_nothing_says_what_it_was_told() -> None:
    clock = make_clock()
    assert clock.links() == LINKS
    assert clock.codecs() == [ZSTD, INT4]
    assert clock.stats().stages["disk"].num_samples == 0


def test_disk_that_is_as_fast_as_told_stays_so() -> None:
    clock = make_clock()
    for num_reads in (1, 10, 3, 100):
        clock.observe_disk(10**6, num_reads, 1e-3 + num_reads * 1e-4)
    assert clock.links().disk_bytes_per_s == pytest.approx(1e9)
    assert clock.links().read_s == pytest.approx(1e-4)
    assert clock.stats().stages["disk"].error == pytest.approx(0)


@pytest.mark.parametrize("times_slower", [0.5, 3.0])
def test_disk_with_reads_of_one_size_is_taken_to_change_as_a_whole(times_slower: float) -> None:
    clock = make_clock()
    for _ in range(60):
        clock.observe_disk(10**6, 10, times_slower * 2e-3)
    assert clock.links().disk_bytes_per_s == pytest.approx(1e9 / times_slower, rel=0.02)
    assert clock.links().read_s == pytest.approx(1e-4 * times_slower, rel=0.02)


@pytest.mark.parametrize(("of_reads", "of_bytes"), [(3.0, 1.0), (1.0, 3.0), (0.5, 2.0)])
def test_disk_with_reads_of_many_sizes_tells_requests_and_bytes_apart(
    of_reads: float, of_bytes: float
) -> None:
    clock = make_clock()
    for i in range(200):
        num_bytes, num_reads = [(10**6, 1), (10**6, 30), (10**5, 10)][i % 3]
        seconds = of_reads * num_reads * 1e-4 + of_bytes * num_bytes / 1e9
        clock.observe_disk(num_bytes, num_reads, seconds)
    assert clock.links().read_s == pytest.approx(of_reads * 1e-4, rel=0.15)
    assert clock.links().disk_bytes_per_s == pytest.approx(1e9 / of_bytes, rel=0.15)


def test_average_gives_a_fifth_to_the_latest_measurement() -> None:
    clock = make_clock()
    clock.observe_bus(2**33, 2.0)
    assert 2**33 / clock.links().bus_bytes_per_s == pytest.approx(1.2)
    clock.observe_decode("zstd", 2**30, 0.5)
    assert 2**30 / clock.codecs()[0].decode_bytes_per_s == pytest.approx(0.9)


def test_first_computation_is_believed_and_later_ones_are_averaged() -> None:
    clock = make_clock()
    clock.observe_compute(2.0)
    assert clock.stats().compute_s == 2.0
    clock.observe_compute(3.0)
    assert clock.stats().compute_s == pytest.approx(2.2)


def test_one_stall_moves_no_cost_by_more_than_three_fifths() -> None:
    clock = make_clock()
    clock.observe_disk(10**6, 10, 1000.0)
    clock.observe_bus(10**6, 1000.0)
    clock.observe_decode("zstd", 10**6, 1000.0)
    links = clock.links()
    assert 1e9 / links.disk_bytes_per_s == pytest.approx(1.6)
    assert links.read_s == pytest.approx(1.6e-4)
    assert 2**33 / links.bus_bytes_per_s == pytest.approx(1.6)
    assert clock.stats().stages["disk"].measured_s == 1000.0


def test_codec_whose_decoding_was_thought_free_is_found_not_to_be() -> None:
    clock = make_clock()
    clock.observe_decode("int4", 10**6, 1e-5)
    assert clock.codecs()[1].decode_bytes_per_s == pytest.approx(1e11)


def test_no_work_teaches_nothing() -> None:
    clock = make_clock()
    clock.observe_disk(0, 0, 1.0)
    clock.observe_bus(0, 1.0)
    clock.observe_decode("zstd", 0, 1.0)
    assert clock.links() == LINKS
    assert clock.codecs() == [ZSTD, INT4]


def test_stats_compare_what_was_expected_with_what_was_measured() -> None:
    clock = make_clock()
    clock.observe_bus(2**33, 3.0)
    clock.observe_layer(2.0, 3.0)
    clock.observe_layer(2.0, 2.0)
    stages = clock.stats().stages
    assert (stages["bus"].estimated_s, stages["bus"].measured_s) == (1.0, 3.0)
    assert stages["bus"].error == pytest.approx(2.0)
    assert stages["layer"].num_samples == 2
    assert stages["layer"].measured_s == pytest.approx(2.8)
    assert stages["compute"].error == 0.0


def test_stats_become_plain_numbers_that_json_takes() -> None:
    clock = make_clock()
    clock.observe_compute(0.5)
    data = json.loads(json.dumps(clock.stats().to_dict(), allow_nan=False))
    assert data["read_s"] == 1e-4
    assert data["decode_bytes_per_s"] == {"zstd": 2.0**30, "int4": None}
    assert data["stages"]["compute"] == {"num_samples": 1, "estimated_s": 0.5, "measured_s": 0.5}


def test_stats_do_not_change_when_more_is_measured() -> None:
    clock = make_clock()
    before = clock.stats()
    clock.observe_compute(1.0)
    clock.observe_layer(1.0, 1.0)
    assert before.compute_s == 0.0
    assert before.stages["layer"].num_samples == 0


def test_measurements_of_several_threads_are_all_counted() -> None:
    clock = make_clock()
    start = threading.Barrier(4)

    def measure() -> None:
        start.wait(30)
        for _ in range(250):
            clock.observe_bus(2**20, 2.0**-12)

    threads = [threading.Thread(target=measure) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert clock.stats().stages["bus"].num_samples == 1000
    assert clock.links().bus_bytes_per_s == pytest.approx(2**32)


@pytest.mark.parametrize("seconds", [-1.0, math.nan, math.inf])
def test_times_that_cannot_have_been_measured_are_refused(seconds: float) -> None:
    clock = make_clock()
    with pytest.raises(ConfigError, match="disk"):
        clock.observe_disk(1, 1, seconds)
    with pytest.raises(ConfigError, match="compute"):
        clock.observe_compute(seconds)
    assert clock.stats() == make_clock().stats()


def test_unknown_codec_is_refused_and_the_known_ones_named() -> None:
    with pytest.raises(ConfigError, match="'kivi2', only int4, zstd"):
        make_clock().observe_decode("kivi2", 1, 1.0)
