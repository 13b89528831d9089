"""How far a stream is encoded, and whether that keeps up with it."""

import time
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from offload.video.source import Source
from offload.video.stream import VideoStream


class Progress:
    """A line on the terminal while a source is encoded. A context manager.

    Parameters
    ----------
    source : Source
    stream : VideoStream
    name : str
    """

    def __init__(self, source: Source, stream: VideoStream, name: str) -> None:
        self._source, self._stream = source, stream
        self._start_s = max(0.0, stream.last_s)
        self._started = time.monotonic()
        self.num_frames = 0
        """Encoded since."""
        self.most_behind_s = 0.0
        """How far behind a live stream it has been."""
        self._bar = tqdm(unit="frame", desc=name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def advance(self, count: int) -> None:
        """Say that so many more frames are encoded."""
        if not count:
            return
        self.num_frames += count
        at_s, stats, total_s = self._stream.last_s, self._source.stats, self._source.duration_s
        facts: dict[str, Any] = {"at": f"{at_s:.0f}s" + (f"/{total_s:.0f}s" if total_s else "")}
        shown_at = stats.wall_s(at_s)
        if shown_at is None:
            facts["realtime"] = f"{(at_s - self._start_s) / max(1e-9, self.seconds):.1f}x"
        else:
            behind_s = max(0.0, time.time() - shown_at)
            self.most_behind_s = max(self.most_behind_s, behind_s)
            facts["behind"] = f"{behind_s:.1f}s"
        counted = {
            "dropped": stats.dropped,
            "corrupt": stats.corrupt,
            "reconnects": stats.reconnects,
        }
        facts |= {name: number for name, number in counted.items() if number}
        self._bar.set_postfix(facts, refresh=False)
        self._bar.update(count)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._started

    def figures(self) -> dict[str, Any]:
        """Return what became of the frames, to be written as JSON."""
        stats = self._source.stats
        return {
            "frames": self._stream.units.num_frames,
            "encoded": self.num_frames,
            "seconds": self.seconds,
            "frames_per_s": self.num_frames / max(1e-9, self.seconds),
            "most_behind_s": self.most_behind_s,
            "decoded": stats.decoded,
            "skipped": stats.skipped,
            "dropped": stats.dropped,
            "corrupt": stats.corrupt,
            "reconnects": stats.reconnects,
            "gaps": [gap._asdict() for gap in stats.gaps],
        }
