import pytest

from offload.video.source import Gap, SourceStats


def test_wall_time_of_a_source_that_is_not_live_is_unknown() -> None:
    assert SourceStats().wall_s(3.0) is None


@pytest.mark.parametrize(
    ("time_s", "wall_s"), [(0.0, 1000.0), (9.0, 1009.0), (30.0, 1031.0), (45.0, 1047.5)]
)
def test_wall_time_after_a_gap_counts_from_its_end(time_s: float, wall_s: float) -> None:
    stats = SourceStats(wall_start_s=1000.0)
    stats.gaps += [Gap(10.0, 20.0, 1021.0, "lost"), Gap(40.0, 42.0, 1044.5, "lost")]

    assert stats.wall_s(time_s) == wall_s


def test_wall_time_follows_the_frames_that_arrived_soonest() -> None:
    stats = SourceStats()

    for time_s, now_s in [(0.0, 1001.0), (0.5, 1001.0), (1.0, 1001.0), (2.0, 1003.0)]:
        stats.note_arrival(time_s, now_s)

    assert stats.wall_s(0.0) == 1000.0


def test_wall_time_after_a_gap_follows_the_frames_that_arrived_since() -> None:
    stats = SourceStats(wall_start_s=1000.0)
    stats.gaps.append(Gap(1.0, 5.0, 1006.0, "lost"))

    for time_s, now_s in [(5.0, 1006.0), (6.0, 1006.5), (7.0, 1009.0)]:
        stats.note_arrival(time_s, now_s)

    assert (stats.wall_s(1.0), stats.wall_s(5.0)) == (1001.0, 1005.5)
