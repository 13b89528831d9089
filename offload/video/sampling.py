"""Which frames to take, by the time at which they are shown."""

import math

from offload.errors import ConfigError

_TOLERANCE_S = 6e-4
"""Matroska and FLV count milliseconds, and so round the time of a frame by up to half of one."""


def check_rate(what: str, rate: float | None) -> None:
    """Raise ConfigError unless a rate is a positive number, or None."""
    if rate is not None and not 0 < rate < math.inf:
        raise ConfigError(f"{what} is {rate}; it must be a positive number of frames per second")


class Sampler:
    """Takes the first frame that is shown at or after each of the times ``k / fps``, to a rounding.

    Times are those of the frames, so nothing drifts where a rate is odd or varies. Where the
    stream has fewer frames than asked for, each is taken once.

    Parameters
    ----------
    fps : float or None
        Frames per second of the stream; None takes every frame.

    Raises
    ------
    ConfigError
        ``fps`` is not a positive number.
    """

    def __init__(self, fps: float | None) -> None:
        check_rate("fps", fps)
        self.fps = fps
        self._next = 0

    def takes(self, time_s: float) -> bool:
        """Whether to take the frame shown at ``time_s``; times must not decrease."""
        if self.fps is None:
            return True
        sample = math.floor((time_s + _TOLERANCE_S) * self.fps)
        if sample < self._next:
            return False
        self._next = sample + 1
        return True
