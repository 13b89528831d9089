"""Frames of a video file."""

import logging
from collections.abc import Generator
from pathlib import Path

from offload.errors import ConfigError, StorageError
from offload.video.decoding import VideoReader, to_image
from offload.video.sampling import Sampler
from offload.video.source import Source
from offload.video.stream_clock import StreamClock
from offload.video.types import Frame

_LOG = logging.getLogger(__name__)

_HOUR_S = 3600.0
_TOLERATED_END_S = 1.0
"""Sound often goes on for longer than the pictures do."""


class VideoFile(Source):
    """Decodes as it is read: one frame in memory, and those that libav's threads work on.

    Parameters
    ----------
    path : Path
    sampler : Sampler

    Raises
    ------
    ConfigError
        It cannot be opened, is empty, or holds no video.
    """

    def __init__(self, path: Path, sampler: Sampler) -> None:
        if path.stat().st_size == 0:
            raise ConfigError(f"{path}: asked for a video, found an empty file (0 bytes)")
        try:
            self._reader = VideoReader(f"file:{path}", on_corrupt=self._count, threads="AUTO")
        except StorageError as error:
            raise ConfigError(f"{path} cannot be read as a video: {error}") from error
        super().__init__(str(path), self._reader.duration_s)
        self._sampler = sampler
        self._frames = self._decode()

    def read_frame(self) -> Frame:  # noqa: D102 - docstring inherited
        return next(self._frames)

    def _release(self) -> None:
        self._frames.close()
        self._reader.close()

    def _decode(self) -> Generator[Frame]:
        # The length in the header may be too short where the rate varies.
        longest_step_s = max(self.duration_s or 0.0, _HOUR_S)
        clock = StreamClock(self.name, longest_step_s, self._reader.start_s)
        try:
            for stamp_s, frame in self._reader.frames():
                step_s = self._reader.period_s if self.stats.decoded else 0.0
                time_s = clock.advance(stamp_s, step_s)
                self.stats.decoded += 1
                if self._sampler.takes(time_s):
                    yield Frame(time_s, to_image(frame))
                else:
                    self.stats.skipped += 1
        except StorageError as error:
            where = f"{self.name}, after {self.stats.decoded} frames"
            raise StorageError(f"{where}: {error}") from error
        if not self.stats.decoded:
            raise StorageError(
                f"{self.name}: not one frame in it could be decoded, "
                f"{self.stats.corrupt} packets or frames are damaged"
            )
        self._report(clock.time_s)

    def _report(self, end_s: float) -> None:
        if self.stats.corrupt:
            _LOG.warning("%s: left out %d damaged frames", self.name, self.stats.corrupt)
        if self.duration_s is not None and end_s + _TOLERATED_END_S < self.duration_s:
            _LOG.warning("%s: ends at %.1f s of %.1f s", self.name, end_s, self.duration_s)

    def _count(self) -> None:
        self.stats.corrupt += 1
