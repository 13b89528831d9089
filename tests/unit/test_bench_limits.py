"""The least time that moving bytes takes."""

import pytest

from offload.bench.limits import Bandwidths, Moved, least_seconds, typical

SPEEDS = Bandwidths(memory=100.0, disk=10.0, bus=20.0)


@pytest.mark.parametrize(
    ("moved", "seconds"),
    [
        (Moved(scanned=0.0, read=200.0), 2.0),
        (Moved(scanned=100.0, read=200.0, weights=300.0), 6.0),
        (Moved(scanned=0.0, read=100.0, disk=50.0), 5.0),
        (Moved(scanned=0.0, read=100.0, disk=5.0), 1.0),
        (Moved(scanned=0.0, read=100.0, host=60.0, disk=10.0), 3.0),
    ],
)
def test_least_seconds_of_several_ways_is_that_of_the_slowest(moved: Moved, seconds: float) -> None:
    assert least_seconds(moved, SPEEDS) == pytest.approx(seconds)


@pytest.mark.parametrize("moved", [Moved(None, 1.0), Moved(1.0, None)])
def test_least_seconds_of_bytes_that_nobody_counts_is_unknown(moved: Moved) -> None:
    assert least_seconds(moved, SPEEDS) is None


def test_typical_of_measurements_is_their_median_and_unknown_where_all_are() -> None:
    speeds = [Bandwidths(memory, disk) for memory, disk in [(1.0, 5.0), (9.0, 6.0), (2.0, 70.0)]]
    assert typical(speeds) == Bandwidths(2.0, 6.0, None)
