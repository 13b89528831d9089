import logging
import threading
from collections.abc import Callable

import numpy as np
import pytest

from offload.errors import ClosedError, ConfigError, StorageError, TransferTimeout
from offload.video.live_queue import LiveQueue, Policy
from offload.video.source import SourceStats
from offload.video.types import Frame

pytestmark = pytest.mark.leaks

_WAIT_S = 10.0


def _frame(time_s: float) -> Frame:
    return Frame(time_s, np.zeros((1, 1, 3), np.uint8))


class _Thread:
    """A call on a thread, whose result is asked for later."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._outcome: object = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome = self._call()
        except Exception as error:  # the outcome, which the test looks at
            self._outcome = error

    def outcome(self) -> object:
        self._thread.join(_WAIT_S)
        assert not self._thread.is_alive()
        return self._outcome


class _WatchedQueue(LiveQueue):
    """Says when its feeding thread finds it full, and its consumer finds it empty."""

    def __init__(self, stats: SourceStats, max_frames: int = 64) -> None:
        self.time_s = 0.0
        super().__init__("test", stats, "block", max_frames, now=lambda: self.time_s)
        self.is_full = threading.Event()
        self.is_empty = threading.Event()

    def _patience_s(self, timeout_s: float | None) -> float | None:
        try:
            return super()._patience_s(timeout_s)
        finally:
            self.is_empty.set()

    def _await_room(self) -> None:
        if len(self) == self._max_frames:
            self.is_full.set()
        super()._await_room()


def _drain(queue: LiveQueue) -> list[float]:
    frames = iter(lambda: queue.get(_WAIT_S), None)
    return [frame.time_s for frame in frames]


@pytest.mark.parametrize(
    ("policy", "kept"), [("drop_oldest", [6.0, 7.0, 8.0]), ("drop_newest", [0.0, 1.0, 2.0])]
)
def test_queue_that_overflows_keeps_what_its_policy_names_and_counts_the_rest(
    policy: Policy, kept: list[float]
) -> None:
    stats = SourceStats()
    queue = LiveQueue("test", stats, policy, 3)

    assert all(queue.put(_frame(k)) for k in range(9))
    queue.finish()

    assert _drain(queue) == kept
    assert stats.dropped == 6


def test_queue_that_blocks_makes_its_feed_wait_and_loses_nothing() -> None:
    stats = SourceStats()
    queue = _WatchedQueue(stats, 2)

    def feed() -> None:
        for k in range(5):
            queue.put(_frame(k))
        queue.finish()

    thread = _Thread(feed)
    assert queue.is_full.wait(_WAIT_S)
    assert len(queue) == 2

    assert _drain(queue) == [0, 1, 2, 3, 4]
    assert thread.outcome() is None
    assert stats.dropped == 0


def test_queue_that_drops_says_so_once_for_each_burst(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    queue = LiveQueue("cam", SourceStats(), "drop_newest", 1, now=lambda: now[0])

    def burst(lost: int) -> None:
        for k in range(lost + 1):
            queue.put(_frame(k))
        assert queue.get(_WAIT_S) is not None

    with caplog.at_level(logging.WARNING):
        burst(2)
        burst(3)
        now[0] += 2 * _WAIT_S
        with pytest.raises(TransferTimeout):
            queue.get(_WAIT_S)
        burst(4)

    slow = "cam: the consumer is slower than the stream and 1 frames wait: drop_newest from now on"
    assert [record.getMessage() for record in caplog.records] == [
        slow,
        "cam: caught up; 5 frames were dropped",
        slow,
    ]


def test_queue_without_a_sign_of_life_times_out_and_names_the_source() -> None:
    now = [0.0]
    stats = SourceStats(decoded=7, reconnects=2)
    queue = LiveQueue("rtsp://camera", stats, now=lambda: now[0])
    now[0] = 5.0

    with pytest.raises(
        TransferTimeout, match=r"rtsp://camera: no frame for 5.0 s \(7 decoded .* 2"
    ):
        queue.get(5.0)


def test_queue_that_timed_out_gives_a_frame_that_comes_later() -> None:
    now = [0.0]
    queue = LiveQueue("test", SourceStats(), now=lambda: now[0])
    now[0] = 5.0
    with pytest.raises(TransferTimeout):
        queue.get(5.0)

    queue.put(_frame(3.0))

    frame = queue.get(5.0)
    assert frame is not None
    assert frame.time_s == 3.0


def test_queue_with_signs_of_life_but_no_frame_goes_on_waiting() -> None:
    queue = _WatchedQueue(SourceStats())
    queue.time_s = 100.0
    queue.beat()

    getter = _Thread(lambda: queue.get(50.0))
    assert queue.is_empty.wait(_WAIT_S)
    queue.put(_frame(1.0))

    frame = getter.outcome()
    assert isinstance(frame, Frame)
    assert frame.time_s == 1.0


def test_queue_whose_feed_waits_for_room_is_not_silent() -> None:
    """Scenario: the consumer works for longer than the time limit, with the queue full."""
    queue = _WatchedQueue(SourceStats(), 1)
    feed = _Thread(lambda: [queue.put(_frame(k)) for k in range(2)])
    assert queue.is_full.wait(_WAIT_S)
    queue.time_s = 1000.0

    times = [queue.get(5.0), queue.get(5.0)]

    assert [frame.time_s for frame in times if frame] == [0.0, 1.0]
    assert feed.outcome() == [True, True]
    queue.is_empty.clear()
    getter = _Thread(lambda: queue.get(5.0))
    assert queue.is_empty.wait(_WAIT_S)
    queue.put(_frame(2.0))
    assert isinstance(getter.outcome(), Frame)


def test_queue_that_ends_with_an_error_first_gives_the_frames_that_wait() -> None:
    queue = LiveQueue("test", SourceStats())
    queue.put(_frame(1.0))
    queue.finish(StorageError("gone"))

    assert queue.get(_WAIT_S) is not None
    with pytest.raises(StorageError, match="gone"):
        queue.get(_WAIT_S)


def test_queue_that_is_closed_wakes_its_consumer() -> None:
    queue = _WatchedQueue(SourceStats())
    getter = _Thread(lambda: queue.get(None))
    assert queue.is_empty.wait(_WAIT_S)

    queue.close()

    assert isinstance(getter.outcome(), ClosedError)


def test_queue_that_is_closed_wakes_its_feed_and_counts_what_nobody_saw() -> None:
    stats = SourceStats()
    queue = _WatchedQueue(stats, 2)
    feed = _Thread(lambda: [queue.put(_frame(k)) for k in range(3)])
    assert queue.is_full.wait(_WAIT_S)

    queue.close()

    assert feed.outcome() == [True, True, False]
    assert not queue.pause(_WAIT_S)
    assert stats.dropped == 3


@pytest.mark.parametrize(
    ("policy", "queue_frames", "message"),
    [("drop_all", 1, "policy is 'drop_all'; it must be one of block"), ("block", 0, "at least 1")],
)
def test_queue_of_an_unknown_policy_or_without_room_is_refused(
    policy: Policy, queue_frames: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        LiveQueue("test", SourceStats(), policy, queue_frames)
