"""What every source of frames is: an iterator that can be closed and that keeps count."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, Self

from offload.errors import ClosedError
from offload.video.types import Frame


class Gap(NamedTuple):
    """A stretch of a live stream that nobody saw, because the connection was lost.

    Attributes
    ----------
    start_s, end_s : float
        Stream times of the last frame before and of the first one after.
    wall_end_s : float
        When the first frame after it was shown, in seconds since the epoch.
    reason : str
    """

    start_s: float
    end_s: float
    wall_end_s: float
    reason: str


@dataclass(slots=True)
class SourceStats:
    """What became of the frames of a source. May be read at any time, by any thread.

    Once a source has ended, ``decoded == skipped + dropped + yielded``; before, some may wait in
    its queue.

    Attributes
    ----------
    decoded : int
        Frames that could be shown.
    skipped : int
        Of these, not needed at the rate that was asked for.
    dropped : int
        Of these, given up because the consumer was too slow.
    yielded : int
        Of these, handed to the consumer.
    corrupt : int
        Packets, frames or pictures that were damaged and left out. A packet that is lost without
        a trace is not counted.
    reconnects : int
        Times that a lost connection was replaced.
    gaps : list of Gap
        One for each of them.
    wall_start_s : float or None
        When the first frame of a live stream was shown, in seconds since the epoch.
    """

    decoded: int = 0
    skipped: int = 0
    dropped: int = 0
    yielded: int = 0
    corrupt: int = 0
    reconnects: int = 0
    gaps: list[Gap] = field(default_factory=list)
    wall_start_s: float | None = None

    def wall_s(self, time_s: float) -> float | None:
        """Return when a frame of a live stream was shown, in seconds since the epoch.

        Known as well as the frames that came soonest tell, and anew for each connection.

        Returns
        -------
        float or None
            None: the source is not live, or nothing has arrived yet.
        """
        if self.wall_start_s is None:
            return None
        since = [gap for gap in self.gaps if gap.end_s <= time_s]
        if since:
            return since[-1].wall_end_s + time_s - since[-1].end_s
        return self.wall_start_s + time_s

    def note_arrival(self, time_s: float, now_s: float) -> None:
        """Move the wall clock back if it must be: no frame arrives before it is shown.

        The first frames of a connection wait until libav has seen enough of it.
        """
        if self.wall_start_s is None:
            self.wall_start_s = now_s - time_s
        elif not self.gaps:
            self.wall_start_s = min(self.wall_start_s, now_s - time_s)
        else:
            last = self.gaps[-1]
            end_s = min(last.wall_end_s, now_s - (time_s - last.end_s))
            self.gaps[-1] = last._replace(wall_end_s=end_s)


class Source(ABC, Iterator[Frame]):
    """Frames in order of time, one at a time; an iterator and a context manager.

    Invariant: ``time_s`` never decreases from one frame to the next.

    One thread iterates. A source that is not live is also closed by that thread.

    Attributes
    ----------
    name : str
        For messages: the path or address, without its password.
    stats : SourceStats
    """

    def __init__(self, name: str, duration_s: float | None = None) -> None:
        self.name = name
        self.stats = SourceStats()
        self._duration_s = duration_s
        self._is_closed = False

    @property
    def duration_s(self) -> float | None:
        """Length of the whole stream, where it is known; a live one may get to know it."""
        return self._duration_s

    @property
    def is_ahead(self) -> bool:
        """Whether the next frame is there already, or only has to be decoded."""
        return True

    def __next__(self) -> Frame:
        """Return the next frame.

        Raises
        ------
        StopIteration
            The stream has ended.
        ClosedError
            The source was closed.
        StorageError
            A file cannot be read any further.
        TransferTimeout
            A live source gave no frame in time. It goes on trying: ask again, or close it.
        TransferError
            A live source was lost, and could not be reached again.
        """
        if self._is_closed:
            raise ClosedError(f"{self.name}: asked for a frame, but the source was closed")
        frame = self.read_frame()
        self.stats.yielded += 1
        return frame

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back the file, connection and thread. Idempotent."""
        self._is_closed = True
        self._release()

    @abstractmethod
    def read_frame(self) -> Frame:
        """Return the next frame, but do not count it as handed over; for sources of sources."""

    @abstractmethod
    def _release(self) -> None: ...
