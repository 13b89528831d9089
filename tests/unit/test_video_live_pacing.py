from pathlib import Path

import numpy as np
import pytest

from offload.video.live_pacing import Pacing
from offload.video.live_queue import LiveQueue
from offload.video.sampling import Sampler
from offload.video.source_array import ArrayFile


class _TimedQueue(LiveQueue):
    """Has a clock that only goes on while the feed pauses, and while a frame is consumed."""

    def __init__(self, source: ArrayFile, consuming_s: float) -> None:
        super().__init__(source.name, source.stats)
        self.time_s = 100.0
        self.put_at_s: list[float] = []
        self._consuming_s = consuming_s

    def pause(self, seconds: float) -> bool:
        self.time_s += seconds
        return True

    def put(self, frame: object) -> bool:
        self.put_at_s.append(self.time_s)
        self.time_s += self._consuming_s
        return True


@pytest.fixture
def source(tmp_path: Path) -> ArrayFile:
    path = tmp_path / "video.npy"
    np.save(path, np.zeros((4, 2, 2, 3), np.uint8))
    return ArrayFile(path, 2.0, Sampler(None))


@pytest.mark.parametrize(
    ("consuming_s", "put_at_s"),
    [
        pytest.param(0.125, [100, 100.5, 101, 101.5], id="when it is shown"),
        pytest.param(0.75, [100, 100.75, 101.5, 102.25], id="late, at once"),
    ],
)
def test_pacing_of_a_recording_feeds_each_frame_when_it_is_shown(
    source: ArrayFile, consuming_s: float, put_at_s: list[float]
) -> None:
    queue = _TimedQueue(source, consuming_s)

    Pacing(source, now=lambda: queue.time_s).run(queue)

    assert queue.put_at_s == put_at_s


def test_pacing_of_a_closed_queue_closes_its_source_unread(source: ArrayFile) -> None:
    queue = LiveQueue(source.name, source.stats)
    queue.close()

    Pacing(source).run(queue)

    assert source.stats.decoded == 0
    with pytest.raises(RuntimeError, match="was closed"):
        next(source)
