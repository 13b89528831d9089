"""A recording played at the speed at which it was made, as if it were a camera."""

import time
from collections.abc import Callable

from offload.video.live_queue import LiveQueue
from offload.video.source import Source


class Pacing:
    """Feeds each frame of a source when it is shown; what comes late is fed at once.

    Parameters
    ----------
    source : Source
        Not yet begun. It is closed at the end, by the thread that runs this.
    now : callable
        Clock, in seconds.
    """

    patience_s = None
    longest_call_s = 10.0

    def __init__(self, source: Source, *, now: Callable[[], float] = time.monotonic) -> None:
        self.stats = source.stats
        self.duration_s = source.duration_s
        self._source = source
        self._now = now

    def run(self, queue: LiveQueue) -> None:
        """Feed the queue until the source ends or the queue is closed.

        Raises
        ------
        StorageError
            The file cannot be read any further.
        """
        with self._source:
            self.stats.wall_start_s = time.time()
            start_s = self._now()
            while not queue.is_closed:
                try:
                    frame = self._source.read_frame()
                except StopIteration:
                    return
                early_s = frame.time_s - (self._now() - start_s)
                if early_s > 0:
                    queue.pause(early_s)
                queue.put(frame)
