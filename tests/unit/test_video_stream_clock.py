import logging

import pytest

from offload.video.stream_clock import StreamClock

_STEP_S = 0.5
_LONGEST_S = 60.0


def _times(stamps: list[float | None], clock: StreamClock | None = None) -> list[float]:
    clock = clock or StreamClock("test", _LONGEST_S)
    return [clock.advance(stamp, _STEP_S if k else 0.0) for k, stamp in enumerate(stamps)]


@pytest.mark.parametrize(
    ("stamps_s", "times_s"),
    [
        pytest.param([7.0, 7.25, 9.0], [0, 0.25, 2], id="the first timestamp is the origin"),
        pytest.param([None, None, None], [0, 0.5, 1], id="no timestamps"),
        pytest.param([1.0, None, 2.0], [0, 0.5, 1], id="one is missing"),
        pytest.param([0.0, 0.5, 9e4, 1.5, 2.0], [0, 0.5, 1, 1.5, 2], id="one is wild"),
        pytest.param([0.0, 0.5, -9.0, 1.5, 2.0], [0, 0.5, 1, 1.5, 2], id="one is before the last"),
        pytest.param([8.0, 8.5, 0.0, 0.25, 0.5], [0, 0.5, 1, 1.5, 1.75], id="they begin anew"),
        pytest.param([0.0, 9e4, 9e4 + 1, 9e4 + 2], [0, 0.5, 1, 2], id="they jump for good"),
        pytest.param([0.0, 55.0, 110.0], [0, 55, 110], id="steps that can be true"),
        pytest.param([3.0, 3.0, 3.0], [0, 0, 0], id="they stand still"),
    ],
)
def test_clock_with_timestamps_of_all_kinds_gives_one_timeline(
    stamps_s: list[float | None], times_s: list[float]
) -> None:
    assert _times(stamps_s) == times_s


def test_clock_with_a_known_origin_counts_from_there() -> None:
    assert _times([3.0, 3.5], StreamClock("test", _LONGEST_S, origin_s=1.0)) == [2.0, 2.5]


def test_clock_after_a_restart_goes_on_by_the_time_that_elapsed() -> None:
    clock = StreamClock("test", _LONGEST_S)
    _times([100.0, 101.0], clock)

    clock.restart()

    assert [clock.advance(5.0, 20.0), clock.advance(5.5, 0.1)] == [21.0, 21.5]


def test_clock_after_a_restart_has_forgotten_what_was_odd_before() -> None:
    clock = StreamClock("test", _LONGEST_S)
    _times([0.0, 9e4], clock)

    clock.restart()

    assert [clock.advance(stamp_s, 0.5) for stamp_s in (5.0, 9e4 + 1, 6.25)] == [1.0, 1.5, 2.25]


def test_clock_that_is_set_anew_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _times([8.0, 8.5, 0.0, 0.25, 0.5])

    assert [record.getMessage() for record in caplog.records] == [
        "test: timestamps jump by -9.250 s at 1.500 s"
    ]
