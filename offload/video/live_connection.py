"""A live stream over a connection that may be lost and made again."""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from offload.errors import ConfigError, StorageError, TransferError
from offload.video.decoding import VideoReader, require_av, to_image
from offload.video.live_queue import LiveQueue
from offload.video.sampling import Sampler
from offload.video.source import Gap, SourceStats
from offload.video.stream_clock import StreamClock
from offload.video.types import Frame

_LOG = logging.getLogger(__name__)

_MAX_JUMP_S = 60.0
"""Forward. A camera that stands still for longer is rare, one that sets its clock is not."""

_LOOK_US = "2000000"
"""Microseconds of stream to look at when opening: cameras announce tracks that they never send."""

_STEADY_S = 10.0
"""A connection that lasts for less counts as a failed attempt, although it may bring frames: a
sender that begins anew for everybody who connects would be asked for ever."""

_FIRST_DELAY_S = 0.25
_LONGEST_DELAY_S = 5.0


@dataclass(frozen=True, slots=True)
class Address:
    """Where a live stream comes from.

    Attributes
    ----------
    name : str
        For messages: without the password.
    url : str
        As libav reads it.
    demuxer : str or None
        Its name, where the url does not tell.
    options : dict of str to str
        For libav.
    """

    name: str
    url: str
    demuxer: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Loss:
    reason: str
    is_clean: bool = False


class Connection:
    """Decodes a live stream on the thread of its source, connecting again when it is lost.

    Stream time goes on over a loss by the time for which it lasted. A stream whose length is
    known ends where it ends, and is not played again. Any other that its sender closes is tried
    again, like one that broke, and has ended if it stays away.

    Parameters
    ----------
    address : Address
    sampler : Sampler
    timeout_s : float
        How long there may be no frame. A connection that is silent for half of it is given up;
        the other half is left to replace it.
    reconnect : int
        Attempts in a row, with growing pauses. The first connection has as many.

    Raises
    ------
    ConfigError
        PyAV is not installed, or a limit makes no sense.
    """

    def __init__(
        self, address: Address, sampler: Sampler, *, timeout_s: float, reconnect: int
    ) -> None:
        require_av()
        if not 0 < timeout_s < threading.TIMEOUT_MAX:
            raise ConfigError(f"timeout_s is {timeout_s}; it must be positive and finite")
        if reconnect < 0:
            raise ConfigError(f"reconnect is {reconnect}; it must be a number of attempts, or 0")
        self.stats = SourceStats()
        self.duration_s: float | None = None
        self.patience_s = timeout_s
        # To open is two calls of libav, to connect and to look at the streams, of half each.
        self.longest_call_s = timeout_s
        self._address = address
        self._sampler = sampler
        self._reconnect = reconnect
        self._clock = StreamClock(address.name, _MAX_JUMP_S)
        self._arrived_s = 0.0
        self._lost: _Loss | None = None

    def run(self, queue: LiveQueue) -> None:
        """Feed the queue until the stream ends or the queue is closed.

        Raises
        ------
        TransferError
            The connection broke, or was never made, and no attempt to make it again succeeded.
        """
        attempt = 0
        while True:
            decoded, start_s = self.stats.decoded, time.monotonic()
            loss = self._connect(queue)
            if loss is None or queue.is_closed:
                return
            if self.stats.decoded > decoded:
                self._lost = loss
                self._clock.restart()
                if time.monotonic() - start_s > _STEADY_S:
                    attempt = 0
            if attempt == self._reconnect:
                self._give_up(loss)
                return
            attempt += 1
            _LOG.warning(
                "%s: %s; attempt %d of %d to connect again",
                self._address.name,
                loss.reason,
                attempt,
                self._reconnect,
            )
            queue.pause(_delay_s(attempt))

    def _connect(self, queue: LiveQueue) -> _Loss | None:
        if queue.is_closed:
            return None
        try:
            reader = VideoReader(
                self._address.url,
                on_corrupt=self._count_corrupt,
                demuxer=self._address.demuxer,
                options={"analyzeduration": _LOOK_US, **self._address.options},
                timeout_s=self.patience_s / 2,
            )
        except StorageError as error:
            return _Loss(str(error))
        try:
            return self._read(reader, queue)
        except StorageError as error:
            return _Loss(str(error))
        finally:
            reader.close()

    def _read(self, reader: VideoReader, queue: LiveQueue) -> _Loss | None:
        self.duration_s = reader.duration_s
        if reader.is_recording and self._lost is not None:
            # What has a length is played from its beginning, not from where it was lost.
            self._give_up(self._lost)
            return None
        for stamp_s, frame in reader.frames():
            if queue.is_closed:
                return None
            queue.beat()
            time_s = self._next_time_s(stamp_s)
            self.stats.decoded += 1
            if self._sampler.takes(time_s):
                queue.put(Frame(time_s, to_image(frame)))
            else:
                self.stats.skipped += 1
        return None if reader.is_recording else _Loss("the sender closed it", is_clean=True)

    def _next_time_s(self, stamp_s: float | None) -> float:
        arrived_s = time.monotonic()
        last_s = self._clock.time_s
        elapsed_s = arrived_s - self._arrived_s if self.stats.decoded else 0.0
        time_s = self._clock.advance(stamp_s, elapsed_s)
        self._arrived_s = arrived_s
        if self._lost is not None:
            self.stats.reconnects += 1
            self.stats.gaps.append(Gap(last_s, time_s, time.time(), self._lost.reason))
            _LOG.warning("%s: back after %.1f s", self._address.name, time_s - last_s)
            self._lost = None
        self.stats.note_arrival(time_s, time.time())
        return time_s

    def _give_up(self, loss: _Loss) -> None:
        if self._lost is not None and self._lost.is_clean:
            _LOG.info("%s: ended after %d frames", self._address.name, self.stats.decoded)
            return
        raise TransferError(
            f"{self._address.name}: {loss.reason} "
            f"({self.stats.decoded} frames before, {self._reconnect} attempts to connect again)"
        )

    def _count_corrupt(self) -> None:
        self.stats.corrupt += 1


def _delay_s(attempt: int) -> float:
    return 0.0 if attempt == 1 else min(_FIRST_DELAY_S * 2 ** (attempt - 2), _LONGEST_DELAY_S)
