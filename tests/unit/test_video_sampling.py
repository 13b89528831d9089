import math

import pytest

from offload.errors import ConfigError
from offload.video.sampling import Sampler


@pytest.mark.parametrize(
    ("fps", "times_s", "taken_s"),
    [
        pytest.param(None, [0, 0.1, 0.1, 7], [0, 0.1, 0.1, 7], id="no rate takes every frame"),
        pytest.param(1, [0, 0.5, 1, 1.5, 2], [0, 1, 2], id="frames on the grid"),
        pytest.param(0.5, [0, 1, 2, 3, 4, 5], [0, 2, 4], id="less than one per second"),
        pytest.param(1, [0.4, 0.9, 1.3, 2.2, 2.9], [0.4, 1.3, 2.2], id="the first after each time"),
        pytest.param(1, [0, 0.9, 5.3, 5.8, 6.0], [0, 5.3, 6.0], id="a gap is not filled up"),
        pytest.param(50, [0, 0.1, 0.2], [0, 0.1, 0.2], id="rate above that of the stream"),
        pytest.param(30, [0, 0.033, 0.067, 0.1], [0, 0.033, 0.067, 0.1], id="rounded to ms"),
        pytest.param(10, [k * 0.1 for k in range(9)], [k * 0.1 for k in range(9)], id="equal"),
    ],
)
def test_sampler_of_a_rate_takes_the_first_frame_at_or_after_each_sampling_time(
    fps: float | None, times_s: list[float], taken_s: list[float]
) -> None:
    sampler = Sampler(fps)

    assert [time_s for time_s in times_s if sampler.takes(time_s)] == taken_s


def test_sampler_over_an_hour_at_an_odd_rate_does_not_drift() -> None:
    sampler = Sampler(0.5)
    period_s = 1001 / 30_000
    times_s = [k * period_s for k in range(math.ceil(3600 / period_s))]

    taken = [time_s for time_s in times_s if sampler.takes(time_s)]

    assert len(taken) == 1800
    assert all(-1e-3 < time_s - 2 * k < period_s for k, time_s in enumerate(taken))


@pytest.mark.parametrize("fps", [0, -1, math.nan, math.inf])
def test_sampler_of_no_positive_number_is_refused(fps: float) -> None:
    with pytest.raises(ConfigError, match="fps is"):
        Sampler(fps)
