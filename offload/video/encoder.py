"""Encode a stream once: each frame sees the first tokens and a local window before it."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from offload.kernels.reference import merge
from offload.types import Partial
from offload.video import layers
from offload.video.adapter import Unit, VideoAdapter
from offload.video.rotate import attend, rotated
from offload.video.stream import VideoStream
from offload.video.types import Frame
from offload.video.units import UnitPlace

_PIECE_UNITS = 16
"""Units that go through the model together; more gain nothing, and take more memory."""


class StreamEncoder:
    """Puts frames behind a stream. One thread.

    As ReKV does (arXiv 2503.00540, section 3.1): attention within a sliding window, the first
    tokens always seen. Unlike it, the window is whole units before each unit, so that a result does
    not depend on how many come together, and the first tokens are as far away as if nothing lay
    between.

    Parameters
    ----------
    stream : VideoStream
    window_tokens : int
        Of the local window, in whole units.
    """

    def __init__(self, stream: VideoStream, window_tokens: int = 15000) -> None:
        self._stream = stream
        self._adapter = stream.adapter
        self._window_tokens = window_tokens
        self._waiting: list[Frame] = []
        self._windows: dict[int, tuple[Tensor, Tensor]] = {}
        """By layer: keys and values of the units from ``_window_first`` on, not rotated."""
        self._window_first = 1
        if not stream.units.places:
            opening = self._adapter.text(self._adapter.opening())
            if opening.num_tokens:
                self._run([opening])
            else:
                stream.open_without_text(opening)
        else:
            self._reload()

    def add(self, frames: Sequence[Frame]) -> int:
        """Encode frames; those that do not make a whole unit wait for the next ones.

        Returns
        -------
        int
            Frames that were encoded.

        Raises
        ------
        CapacityError, StorageError
            The tiers cannot take them. The stream ends before them, and can go on.
        """
        self._waiting += frames
        each = self._adapter.frames_per_unit
        whole = len(self._waiting) // each * each
        ready, self._waiting = self._waiting[:whole], self._waiting[whole:]
        units = self._adapter.encode(ready) if ready else []
        for start in range(0, len(units), _PIECE_UNITS):
            some = units[start : start + _PIECE_UNITS]
            self._run(some)
            self._stream.thumbnails.add(ready[start * each : (start + len(some)) * each])
        return whole

    def extend(self, frames: Iterator[Frame]) -> Iterator[int]:
        """Encode a source piece by piece; yield how many frames each piece had."""
        size = _PIECE_UNITS * self._adapter.frames_per_unit
        piece: list[Frame] = []
        for frame in frames:
            piece.append(frame)
            if len(piece) == size:
                yield self.add(piece)
                piece = []
        if piece:
            yield self.add(piece)

    def _run(self, units: Sequence[Unit]) -> None:
        stream = self._stream
        embeds = torch.cat([unit.embeds for unit in units])
        levels = [unit.added for unit in units if unit.added is not None]
        assert len(levels) in (0, len(units))
        added = torch.cat(levels, 1) if levels else None
        places = stream.begin(units)
        try:
            layers.run(self._adapter, embeds, _Pass(self, places), added)
        except BaseException:
            stream.undo(places)
            self._windows = {}
            self._reload()
            raise
        stream.commit(places)
        self._trim()

    def window(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Return the keys and values of the local window of a layer."""
        return self._windows.get(layer)

    def extend_window(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Put what was just encoded behind the window of a layer."""
        known = self._windows.get(layer)
        both = (keys, values)
        if known is not None:
            both = (torch.cat([known[0], keys], 1), torch.cat([known[1], values], 1))
        self._windows[layer] = both

    @property
    def window_first(self) -> int:
        """The first unit in the window."""
        return self._window_first

    @property
    def window_tokens(self) -> int:
        """Tokens of the window."""
        return self._window_tokens

    @property
    def stream(self) -> VideoStream:
        """What is being encoded."""
        return self._stream

    def _trim(self) -> None:
        """Let go of units that the next one does not see."""
        units = self._stream.units
        first = units.first_visible(len(units.places), self._window_tokens)
        gone = sum(place.num_tokens for place in units.places[self._window_first : first])
        if gone:
            self._windows = {
                layer: (keys[:, gone:].clone(), values[:, gone:].clone())
                for layer, (keys, values) in self._windows.items()
            }
            self._window_first = first

    def _reload(self) -> None:
        """Read the window back, where the stream goes on after an interruption."""
        units = self._stream.units
        first = units.first_visible(len(units.places), self._window_tokens)
        self._window_first = max(1, first)
        if self._window_first >= len(units.places):
            return
        tokens = range(units.places[self._window_first].first_token, units.places[-1].tokens.stop)
        for layer in range(self._stream.store.num_layers):
            self._windows[layer] = self._stream.store.read(layer, [tokens])


class _Pass(layers.Attends):
    """Attention while a few units are encoded."""

    def __init__(self, encoder: StreamEncoder, places: Sequence[UnitPlace]) -> None:
        self._encoder = encoder
        self._stream = encoder.stream
        self._adapter: VideoAdapter = self._stream.adapter
        self._places = places
        units = self._stream.units
        first = len(units.places) - len(places)
        self._is_opening = first == 0
        window = units.places[encoder.window_first : first]
        known = [*window, *places]
        base = known[0].origin
        self._positions = torch.cat([each.positions + each.origin - base for each in known], 1)
        self._num_new = sum(place.num_tokens for place in places)
        self._hidden = self._hide(known, first)
        self._near = self._distance(first)

    def attend(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """Store what is new, and attend to the window before it and to the first tokens."""
        self._stream.append(layer, keys, values, self._places)
        past = None if self._is_opening else self._encoder.window(layer)
        all_keys, all_values = keys, values
        if past is not None:
            all_keys = torch.cat([past[0], keys], 1)
            all_values = torch.cat([past[1], values], 1)
        asked = rotated(self._adapter, query, self._positions[:, -self._num_new :])
        turned = rotated(self._adapter, all_keys, self._positions)
        parts = [attend(asked, turned, all_values, scale, self._hidden.to(query.device))]
        if not self._is_opening:
            if self._stream.units.places[0].num_tokens:
                parts.append(self._attend_opening(layer, query, scale))
            self._encoder.extend_window(layer, keys, values)
        return merge(parts).out[0].to(query.dtype)

    def _attend_opening(self, layer: int, query: Tensor, scale: float) -> Partial:
        keys, values, positions = self._stream.opening(layer)
        asked = rotated(self._adapter, query, self._near)
        return attend(asked, rotated(self._adapter, keys, positions), values, scale)

    def _hide(self, known: Sequence[UnitPlace], first: int) -> Tensor:
        """Return which keys each new token does not see: later ones, and units that are too far."""
        total = self._positions.shape[1]
        row = torch.arange(total - self._num_new, total)[:, None]
        hidden = torch.arange(total)[None] > row
        if self._is_opening:
            return hidden
        units, start, base = self._stream.units, 0, known[0].first_token
        for number, place in enumerate(self._places, first):
            seen = units.first_visible(number, self._encoder.window_tokens)
            least = units.places[seen].first_token - base
            hidden[start : start + place.num_tokens, : max(0, least)] = True
            start += place.num_tokens
        return hidden

    def _distance(self, first: int) -> Tensor:
        """Return positions of the new tokens as if their window began behind the first tokens."""
        if self._is_opening:
            return self._positions
        units, parts = self._stream.units, []
        opening = units.places[0]
        for number, place in enumerate(self._places, first):
            seen = units.first_visible(number, self._encoder.window_tokens)
            offset = place.origin - units.places[seen].origin + opening.advance
            parts.append(place.positions + offset)
        return torch.cat(parts, 1)
