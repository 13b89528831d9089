"""The bounded queue between a stream that does not wait and a consumer that takes its time."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Literal, get_args

from offload.errors import ClosedError, ConfigError, TransferTimeout
from offload.video.source import SourceStats
from offload.video.types import Frame

_LOG = logging.getLogger(__name__)

Policy = Literal["block", "drop_oldest", "drop_newest"]
"""What happens to a frame that finds the queue full."""


def check_queue(policy: str, queue_frames: int) -> None:
    """Raise ConfigError unless there is such a policy and room for a frame."""
    if policy not in get_args(Policy):
        known = ", ".join(get_args(Policy))
        raise ConfigError(f"policy is {policy!r}; it must be one of {known}")
    if queue_frames < 1:
        raise ConfigError(f"queue_frames is {queue_frames}; it must be at least 1")


class LiveQueue:
    """Frames from one feeding thread to one consuming thread; anybody may close it.

    Invariant: never more than ``max_frames`` frames; what is dropped is counted, and said in the
    log once for each burst. A burst lasts until the consumer finds the queue empty.

    Parameters
    ----------
    name : str
        Of the source, for messages.
    stats : SourceStats
        Its ``dropped`` is kept here.
    policy : {"block", "drop_oldest", "drop_newest"}
        ``block`` makes the feeding thread wait.
    max_frames : int
    now : callable
        Clock for deadlines, in seconds.

    Raises
    ------
    ConfigError
        Another policy, or a length below 1.
    """

    def __init__(
        self,
        name: str,
        stats: SourceStats,
        policy: Policy = "block",
        max_frames: int = 64,
        *,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        check_queue(policy, max_frames)
        self._name = name
        self._stats = stats
        self._policy = policy
        self._max_frames = max_frames
        self._now = now
        self._frames: deque[Frame] = deque()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._is_over = False
        self._error: Exception | None = None
        self._is_feed_waiting = False
        self._last_sign_s = now()
        self._burst_start: int | None = None

    def __len__(self) -> int:
        """Frames that wait."""
        return len(self._frames)

    @property
    def is_closed(self) -> bool:
        """Whether nobody wants any more frames."""
        return self._closing.is_set()

    def beat(self) -> None:
        """Say that the stream is alive, whether or not its frames are wanted."""
        self._last_sign_s = self._now()

    def pause(self, seconds: float) -> bool:
        """Let the feeding thread wait; return whether the queue is still open."""
        return not self._closing.wait(seconds)

    def put(self, frame: Frame) -> bool:
        """Add a frame, by the policy; return whether the queue is still open."""
        with self._changed:
            if self._policy == "block":
                self._await_room()
            if self._closing.is_set():
                self._stats.dropped += 1
                return False
            if len(self._frames) == self._max_frames:
                self._note_drop()
                if self._policy == "drop_newest":
                    return True
                self._frames.popleft()
            self._frames.append(frame)
            self.beat()
            self._changed.notify_all()
        return True

    def finish(self, error: Exception | None = None) -> None:
        """Say that no frame will follow, and why; the consumer still gets those that wait."""
        with self._changed:
            self._is_over = True
            self._error = error
            self._changed.notify_all()

    def get(self, timeout_s: float | None) -> Frame | None:
        """Take the oldest frame, waiting for it.

        Parameters
        ----------
        timeout_s : float or None
            How long the stream may give no sign of life.

        Returns
        -------
        Frame or None
            None: the stream is over.

        Raises
        ------
        TransferTimeout
            It gave no sign for longer.
        ClosedError
            The queue was closed.
        Exception
            What the stream ended with.
        """
        with self._changed:
            while not self._closing.is_set():
                if self._frames:
                    self._changed.notify_all()
                    return self._frames.popleft()
                if self._error is not None:
                    raise self._error
                if self._is_over:
                    return None
                self._note_caught_up()
                self._changed.wait(self._patience_s(timeout_s))
        raise ClosedError(f"{self._name}: closed while a frame was awaited")

    def close(self) -> None:
        """Wake both threads; frames that wait count as dropped. Idempotent."""
        with self._changed:
            self._closing.set()
            self._stats.dropped += len(self._frames)
            self._frames.clear()
            self._changed.notify_all()

    def _await_room(self) -> None:
        self._is_feed_waiting = True
        self._changed.wait_for(
            lambda: len(self._frames) < self._max_frames or self._closing.is_set()
        )
        self._is_feed_waiting = False

    def _note_caught_up(self) -> None:
        if self._burst_start is not None:
            lost = self._stats.dropped - self._burst_start
            _LOG.warning("%s: caught up; %d frames were dropped", self._name, lost)
            self._burst_start = None

    def _note_drop(self) -> None:
        if self._burst_start is None:
            self._burst_start = self._stats.dropped
            _LOG.warning(
                "%s: the consumer is slower than the stream and %d frames wait: %s from now on",
                self._name,
                self._max_frames,
                self._policy,
            )
        self._stats.dropped += 1

    def _patience_s(self, timeout_s: float | None) -> float | None:
        if timeout_s is None:
            return None
        # A feed that waits for room is alive, however long ago its last frame was decoded.
        silence_s = 0.0 if self._is_feed_waiting else self._now() - self._last_sign_s
        if silence_s >= timeout_s:
            raise TransferTimeout(
                f"{self._name}: no frame for {timeout_s} s "
                f"({self._stats.decoded} decoded before, {self._stats.reconnects} reconnects)"
            )
        return timeout_s - silence_s
