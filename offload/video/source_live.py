"""Sources that do not wait: a thread of their own feeds a bounded queue."""

import logging
import threading
from typing import Protocol

from offload.errors import OffloadError, TransferTimeout
from offload.video.live_queue import LiveQueue
from offload.video.source import Source, SourceStats
from offload.video.types import Frame

_LOG = logging.getLogger(__name__)

_GRACE_S = 2.0
"""Beyond its own deadlines, for the thread to end."""


class Feed(Protocol):
    """What runs on the thread of a live source.

    Attributes
    ----------
    stats : SourceStats
    """

    stats: SourceStats

    @property
    def duration_s(self) -> float | None:
        """Length of the stream, if it is known by now."""
        ...

    @property
    def patience_s(self) -> float | None:
        """How long it may give no sign of life. None: for ever, waiting is what it does."""
        ...

    @property
    def longest_call_s(self) -> float:
        """The longest it may not notice that the queue was closed."""
        ...

    def run(self, queue: LiveQueue) -> None:
        """Fill the queue until the stream ends or the queue is closed.

        Raises
        ------
        OffloadError
            The stream did not end, but broke.
        """
        ...


class LiveSource(Source):
    """Frames of a feed, decoded on a daemon thread from the moment this is made.

    Any thread may close it. That takes as long as the feed needs to notice, at most the time limit
    of one call of libav; a device that holds its driver for longer is a TransferTimeout.

    Parameters
    ----------
    name : str
    feed : Feed
    queue : LiveQueue
        Keeps the same stats as the feed.
    """

    def __init__(self, name: str, feed: Feed, queue: LiveQueue) -> None:
        super().__init__(name)
        self.stats = feed.stats
        self._feed = feed
        self._queue = queue
        self._thread = threading.Thread(target=self._run, name=f"offload-video {name}", daemon=True)
        self._thread.start()

    @property
    def duration_s(self) -> float | None:  # noqa: D102 - docstring inherited
        return self._feed.duration_s

    @property
    def is_ahead(self) -> bool:  # noqa: D102 - docstring inherited
        return len(self._queue) > 0

    def read_frame(self) -> Frame:  # noqa: D102 - docstring inherited
        frame = self._queue.get(self._feed.patience_s)
        if frame is None:
            raise StopIteration
        return frame

    def _run(self) -> None:
        try:
            self._feed.run(self._queue)
        except Exception as error:  # the consumer is who can do something about it
            if not isinstance(error, OffloadError):
                _LOG.exception("%s: the decoding thread failed", self.name)
            self._queue.finish(error)
        else:
            self._queue.finish()

    def _release(self) -> None:
        self._queue.close()
        limit_s = self._feed.longest_call_s + _GRACE_S
        self._thread.join(limit_s)
        if self._thread.is_alive():
            raise TransferTimeout(f"{self.name}: its thread did not end within {limit_s} s")
