"""Video to frames by PyAV: what is damaged is left out and counted. Knows no sampling, no time."""

from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import numpy as np

from offload.errors import ConfigError, StorageError
from offload.video.types import Image

if TYPE_CHECKING:
    from av import FFmpegError, Packet, VideoFrame, VideoStream

_DEFAULT_FPS = 25
"""Of a bare stream that says nothing about its rate."""

_MAX_FAILED_READS = 64
"""In a row. A demuxer may fail without moving on, and would do so for ever."""


def require_av() -> ModuleType:
    """Return the module ``av``.

    Raises
    ------
    ConfigError
        PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            "video needs PyAV, which is not installed: pip install 'kv-offload[video]'"
        ) from error
    return av


class VideoReader:
    """Decodes the best video stream of a file, device or address, from its beginning to its end.

    One thread uses it, closing included.

    Parameters
    ----------
    url : str
        As libav reads it; a path is ``file:<path>``.
    on_corrupt : callable
        Called for each packet or frame that is left out.
    demuxer : str, optional
        Its name, where the url does not tell.
    options : dict of str to str, optional
        For the demuxer and the protocol.
    timeout_s : float, optional
        The longest that opening, or one read, may take.
    threads : {"SLICE", "AUTO"}
        ``AUTO`` also decodes several frames at once, which delays each of them.

    Attributes
    ----------
    period_s : float
        Time between two frames, as far as the stream tells it.
    start_s : float or None
        The first timestamp, where it is known before decoding.

    Raises
    ------
    ConfigError
        PyAV is not installed.
    StorageError
        It cannot be opened, or holds no video. The message does not name the url, which may hold
        a password.
    """

    def __init__(
        self,
        url: str,
        *,
        on_corrupt: Callable[[], None],
        demuxer: str | None = None,
        options: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        threads: Literal["SLICE", "AUTO"] = "SLICE",
    ) -> None:
        self._av = require_av()
        self._on_corrupt = on_corrupt
        self._timeout_s = timeout_s
        try:
            # Tags in other encodings than UTF-8 are common, and nothing here reads them.
            self._container = self._av.open(
                url,
                format=demuxer,
                options=dict(options or {}),
                timeout=timeout_s,
                metadata_errors="replace",
            )
        except self._av.FFmpegError as error:
            raise StorageError(self._explain(error)) from None
        stream = self._container.streams.best("video")
        if stream is None:
            kinds = ", ".join(other.type for other in self._container.streams) or "nothing"
            self._container.close()
            raise StorageError(f"no video stream in it, only: {kinds}")
        stream.thread_type = threads
        rate = stream.guessed_rate or stream.average_rate or _DEFAULT_FPS
        self.period_s = float(1 / rate)
        start, base = stream.start_time, stream.time_base
        self.start_s = None if start is None or base is None else float(start * base)

    @property
    def duration_s(self) -> float | None:
        """Length of the whole, if it is known; a live stream has none."""
        duration = self._container.duration
        return None if duration is None else duration / self._av.time_base

    @property
    def is_recording(self) -> bool:
        """Whether its length is known, in seconds or bytes, so that its end is no interruption."""
        # The bytes that a playlist has say nothing about those that it will list.
        is_playlist = self._container.format.name in ("hls", "dash")
        return self.duration_s is not None or (self._container.size > 0 and not is_playlist)

    def frames(self) -> Iterator[tuple[float | None, "VideoFrame"]]:
        """Yield timestamps in seconds (None where missing) and frames, in order of presentation.

        Raises
        ------
        StorageError
            Nothing more can be read, and this is not the end. What was read before has been
            decoded and yielded.
        """
        # The stream owns the decoder and its threads; to keep it would be to keep them.
        stream = self._container.streams.best("video")
        try:
            for packet in self._packets(stream):
                yield from self._decode(stream, packet)
        except StorageError:
            yield from self._decode(stream, None)
            raise

    def _decode(
        self, stream: "VideoStream", packet: "Packet[VideoStream] | None"
    ) -> Iterator[tuple[float | None, "VideoFrame"]]:
        try:
            frames = stream.decode(packet)
        except self._av.FFmpegError:
            self._on_corrupt()
            return
        for frame in frames:
            if frame.is_corrupt:
                self._on_corrupt()
            elif frame.pts is None or stream.time_base is None:
                yield None, frame
            else:
                # By the clock of the stream: frames that are flushed do not know theirs.
                yield float(frame.pts * stream.time_base), frame

    def _packets(self, stream: "VideoStream") -> Iterator["Packet[VideoStream]"]:
        failures = 0
        while True:
            try:
                for packet in self._container.demux(stream):
                    failures = 0
                    yield packet
            except self._av.InvalidDataError as error:
                self._on_corrupt()
                failures += 1
                if failures == _MAX_FAILED_READS:
                    raise StorageError(
                        f"{failures} reads in a row failed: {error.strerror}"
                    ) from None
            except self._av.FFmpegError as error:
                raise StorageError(self._explain(error)) from None
            except IndexError:
                # At the end, PyAV also flushes streams that turned up on the way, as damage makes
                # them do, and does not know them; its own come first and have been flushed.
                return
            else:
                return

    def close(self) -> None:
        """Give the file or connection back. Idempotent."""
        self._container.close()

    def _explain(self, error: "FFmpegError") -> str:
        if isinstance(error, self._av.ExitError):
            return f"nothing came for {self._timeout_s} s"
        return error.strerror or type(error).__name__


def to_image(frame: "VideoFrame") -> Image:
    """Return a frame as it is to be shown: RGB, turned as its display matrix says.

    Quarter turns only. Pixels that are not square are not stretched.

    Returns
    -------
    ndarray, uint8 [height, width, 3]
    """
    image = frame.to_ndarray(format="rgb24")
    return np.ascontiguousarray(np.rot90(image, round(frame.rotation / 90)))
