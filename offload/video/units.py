"""Which tokens of a stream are which unit, and where each stands."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.types import round_up
from offload.video.adapter import Unit

_ROUNDING = 1e-3
"""Of a position: times of presentation are rounded, and a whole number may come out just below."""


@dataclass(frozen=True, slots=True)
class UnitPlace:
    """Where a unit lies.

    Attributes
    ----------
    first_token, num_tokens : int
    positions : Tensor, int64 [num_axes, num_tokens]
        From the beginning of the unit.
    start : tuple of float
        Its position from the beginning of the stream, by axis, before it is rounded down.
    advance : int
    step : tuple of float
        How much further text starts that follows it, and the next unit; see ``Unit``.
    time_s : float
    first_frame, num_frames : int
    last_s : float, optional
        Of its last frame, if it has several.
    """

    first_token: int
    num_tokens: int
    positions: Tensor
    start: tuple[float, ...]
    advance: int
    step: tuple[float, ...]
    time_s: float
    first_frame: int
    num_frames: int
    last_s: float | None = None

    @property
    def tokens(self) -> range:
        """Its tokens."""
        return range(self.first_token, self.first_token + self.num_tokens)

    @property
    def complete_s(self) -> float:
        """When all of it has been shown."""
        return self.time_s if self.last_s is None else self.last_s

    @property
    def origin(self) -> Tensor:
        """Where its positions count from, int64 [num_axes, 1]."""
        return _whole(self.start)


class UnitTable:
    """The units of a stream; the first one is the text before the first frame.

    One thread adds; others may read what was there when they began.

    Parameters
    ----------
    chunk_tokens : int
        The first frame begins at a chunk, so that units of as many tokens, or a multiple of them,
        are whole chunks.
    """

    def __init__(self, chunk_tokens: int = 1) -> None:
        self.places: list[UnitPlace] = []
        self._chunk_tokens = chunk_tokens

    @property
    def end(self) -> int:
        """The token at which the next unit begins."""
        if not self.places:
            return 0
        stop = self.places[-1].tokens.stop
        return round_up(stop, self._chunk_tokens) if len(self.places) == 1 else stop

    def add(self, units: Sequence[Unit]) -> list[UnitPlace]:
        """Put units behind those that are there."""
        added = []
        for unit in units:
            last = self.places[-1] if self.places else None
            axes = len(unit.positions)
            positions = unit.positions.cpu()
            if last is not None and torch.equal(last.positions, positions):
                positions = last.positions  # hours of units that are all alike
            place = UnitPlace(
                self.end,
                unit.num_tokens,
                positions,
                (0.0,) * axes if last is None else _moved(last.start, last.step),
                unit.advance,
                (float(unit.advance),) * axes if unit.step is None else unit.step,
                unit.time_s,
                0 if last is None else last.first_frame + last.num_frames,
                unit.num_frames,
                unit.last_s,
            )
            self.places.append(place)
            added.append(place)
        return added

    @property
    def num_frames(self) -> int:
        """Frames so far."""
        return self.places[-1].first_frame + self.places[-1].num_frames if self.places else 0

    def before(self, time_s: float | None) -> int:
        """Return how many units, the text included, come before a time; all for None.

        A unit comes before a time if all of its frames do.
        """
        if time_s is None:
            return len(self.places)
        count = 1
        while count < len(self.places) and self.places[count].complete_s < time_s:
            count += 1
        return count

    def first_visible(self, number: int, window_tokens: int) -> int:
        """Return the first unit of the local window before a unit, by whole units."""
        left, first = window_tokens, number
        while first > 1 and self.places[first - 1].num_tokens <= left:
            first -= 1
            left -= self.places[first].num_tokens
        return first


def laid_out(places: Sequence[UnitPlace], start: int, num_axes: int = 1) -> tuple[Tensor, int]:
    """Put units one after the other, whatever lay between them.

    Parameters
    ----------
    places : sequence of UnitPlace
    start : int
        Of the first one, on every axis.
    num_axes : int

    Returns
    -------
    positions : Tensor, int64 [num_axes, num_tokens]
    end : int
        Where text that follows starts.
    """
    parts = [torch.empty(num_axes, 0, dtype=torch.long)]
    at, end = (float(start),) * num_axes, start
    for place in places:
        parts.append(place.positions + _whole(at))
        end = int(at[-1]) + place.advance
        at = _moved(at, place.step)
    return torch.cat(parts, 1), end


def _moved(start: Sequence[float], step: Sequence[float]) -> tuple[float, ...]:
    return tuple(at + by for at, by in zip(start, step, strict=True))


def _whole(start: Sequence[float]) -> Tensor:
    return torch.tensor([math.floor(at + _ROUNDING) for at in start])[:, None]
