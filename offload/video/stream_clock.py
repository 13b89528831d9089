"""One timeline from timestamps that start anywhere, jump, and are missing."""

import logging

_LOG = logging.getLogger(__name__)


class StreamClock:
    """Gives each frame a time; times begin at 0 and never decrease.

    A timestamp that jumps is damage as long as it is alone: its frame is placed after the last
    one by ``elapsed_s``, and so is a frame that has no timestamp. Two that agree with each other
    are a clock that was set anew, and are followed from there.

    Parameters
    ----------
    name : str
        Of the source, for the log.
    max_jump_s : float
        The longest step forward that is believed, beyond the time that has elapsed.
    origin_s : float, optional
        The timestamp that is time 0. Without it, that of the first frame.

    Attributes
    ----------
    time_s : float
        Of the last frame; 0 before the first.
    """

    def __init__(self, name: str, max_jump_s: float, origin_s: float | None = None) -> None:
        self.name = name
        self.max_jump_s = max_jump_s
        self.time_s = 0.0
        self._offset_s = None if origin_s is None else -origin_s
        self._odd_s: float | None = None

    def restart(self) -> None:
        """Expect timestamps that have nothing to do with those before: another connection."""
        self._offset_s = None
        self._odd_s = None

    def advance(self, stamp_s: float | None, elapsed_s: float) -> float:
        """Return the time of the next frame.

        Parameters
        ----------
        stamp_s : float or None
            Its timestamp, from any origin.
        elapsed_s : float
            How much later than the last frame it is, if the timestamp cannot tell. 0 for the first.
        """
        guess_s = self.time_s + elapsed_s
        if stamp_s is None:
            self.time_s = guess_s
        elif self._offset_s is None:
            self.time_s = guess_s
            self._offset_s = guess_s - stamp_s
        else:
            self.time_s = self._follow(stamp_s, self._offset_s, elapsed_s, guess_s)
        return self.time_s

    def _follow(self, stamp_s: float, offset_s: float, elapsed_s: float, guess_s: float) -> float:
        longest_step_s = elapsed_s + self.max_jump_s
        if 0 <= stamp_s + offset_s - self.time_s <= longest_step_s:
            self._odd_s = None
            return stamp_s + offset_s
        if self._odd_s is None or not 0 <= stamp_s - self._odd_s <= longest_step_s:
            self._odd_s = stamp_s
            return guess_s
        jump_s = stamp_s + offset_s - guess_s
        _LOG.warning("%s: timestamps jump by %.3f s at %.3f s", self.name, jump_s, guess_s)
        self._offset_s = guess_s - stamp_s
        self._odd_s = None
        return guess_s
