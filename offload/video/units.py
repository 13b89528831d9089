"""Which tokens of a stream are which unit, and where each stands."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.video.adapter import Unit


@dataclass(frozen=True, slots=True)
class UnitPlace:
    """Where a unit lies.

    Attributes
    ----------
    first_token, num_tokens : int
    positions : Tensor, int64 [num_axes, num_tokens]
        From the beginning of the unit.
    start, advance : int
        Its position from the beginning of the stream, and how much further the next one starts.
    time_s : float
    first_frame, num_frames : int
    """

    first_token: int
    num_tokens: int
    positions: Tensor
    start: int
    advance: int
    time_s: float
    first_frame: int
    num_frames: int

    @property
    def tokens(self) -> range:
        """Its tokens."""
        return range(self.first_token, self.first_token + self.num_tokens)


class UnitTable:
    """The units of a stream; the first one is the text before the first frame.

    One thread adds; others may read what was there when they began.
    """

    def __init__(self) -> None:
        self.places: list[UnitPlace] = []

    def add(self, units: Sequence[Unit]) -> list[UnitPlace]:
        """Put units behind those that are there."""
        added = []
        for unit in units:
            last = self.places[-1] if self.places else None
            place = UnitPlace(
                0 if last is None else last.tokens.stop,
                unit.num_tokens,
                unit.positions.cpu(),
                0 if last is None else last.start + last.advance,
                unit.advance,
                unit.time_s,
                0 if last is None else last.first_frame + last.num_frames,
                unit.num_frames,
            )
            self.places.append(place)
            added.append(place)
        return added

    @property
    def num_frames(self) -> int:
        """Frames so far."""
        return self.places[-1].first_frame + self.places[-1].num_frames if self.places else 0

    def before(self, time_s: float | None) -> int:
        """Return how many units, the text included, come before a time; all for None."""
        if time_s is None:
            return len(self.places)
        count = 1
        while count < len(self.places) and self.places[count].time_s < time_s:
            count += 1
        return count

    def first_visible(self, number: int, window_tokens: int) -> int:
        """Return the first unit of the local window before a unit, by whole units."""
        left, first = window_tokens, number
        while first > 1 and self.places[first - 1].num_tokens <= left:
            first -= 1
            left -= self.places[first].num_tokens
        return first


def laid_out(places: Sequence[UnitPlace], start: int) -> tuple[Tensor, int]:
    """Put units one after the other, whatever lay between them.

    Returns
    -------
    positions : Tensor, int64 [num_axes, num_tokens]
    end : int
        Where what follows starts.
    """
    parts = []
    for place in places:
        parts.append(place.positions + start)
        start += place.advance
    axes = places[0].positions.shape[0] if places else 1
    empty = torch.empty(axes, 0, dtype=torch.long)
    return torch.cat([empty, *parts], 1), start
