"""Attention while a question is asked: each layer reads the units that it chooses."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from offload.kernels.reference import merge
from offload.video import layers
from offload.video.retrieval import RetrievalPlan, chosen, coverage_of, scores_of
from offload.video.rotate import attend, rotated
from offload.video.stream import VideoStream
from offload.video.units import laid_out

if TYPE_CHECKING:
    from offload.video.stream_store import PendingStates


@dataclass(slots=True)
class LayerContext:
    """What a layer attends to.

    Attributes
    ----------
    keys, values : Tensor, shape (num_kv_heads, num_tokens, dim)
        Rotated: the opening, then the units that were chosen, close together.
    units : list of int
        Which these are, counted from the first frame's.
    spans : list of range
        Their tokens.
    end : int
        The position of what follows.
    own : list of (Tensor, Tensor)
        Keys, rotated, and values of what was said since.
    """

    keys: Tensor
    values: Tensor
    units: list[int]
    spans: list[range]
    end: int
    own: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class QuestionPass(layers.Attends):
    """Everything that is run through the model for one question.

    Where it is not for the layers to choose, the next one's units are read while one attends.
    ``close`` when it is over.

    Parameters
    ----------
    stream : VideoStream
    plan : RetrievalPlan
    num_units : int
        Units of frames that the question may see.
    asking : slice
        Which tokens of the first pass are the question itself.
    scores : Tensor, optional, shape (num_units,)
        What units are worth, if it is not for the layers to say.
    """

    def __init__(
        self,
        stream: VideoStream,
        plan: RetrievalPlan,
        num_units: int,
        asking: slice,
        scores: Tensor | None = None,
    ) -> None:
        self._stream = stream
        self._plan = plan
        self._num_units = num_units
        self._asking = asking
        self._told = scores
        self._positions = torch.empty(0)
        self._advance = 0
        self._said = 0
        self.contexts: dict[int, LayerContext] = {}
        self.scores: dict[int, Tensor] = {}
        self.masses = torch.zeros(num_units)
        """Of each unit, the largest share of attention that it got from the start of the answer."""
        self.is_answering = False
        self.coverage: dict[int, float] = {}
        """By layer: the estimated share of the question's attention that the units read get."""
        self.select_s = self.load_s = 0.0
        """For how long layers chose, and stood still for what they chose."""
        self._ahead: dict[int, PendingStates] = {}

    def close(self) -> None:
        """Give up what is being read ahead. Idempotent."""
        for pending in self._ahead.values():
            pending.abandon()
        self._ahead = {}

    def forget_question(self) -> None:
        """Keep what was chosen, and let go of what was said."""
        for context in self.contexts.values():
            context.own = []
        self._said = self._advance = 0

    def next(self, positions: Tensor, advance: int) -> None:
        """Say where the tokens of the next pass stand, from the end of what was said so far.

        Parameters
        ----------
        positions : Tensor, int64 [num_axes, num_tokens]
        advance : int
        """
        self._said += self._advance
        self._positions, self._advance = positions, advance

    def attend(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """Attend to what the layer chose, and to what was said."""
        adapter = self._stream.adapter
        context = self.contexts.get(layer)
        if context is None:
            context = self.contexts[layer] = self._choose(layer, query, scale)
        positions = self._positions + context.end + self._said
        asked = rotated(adapter, query, positions)
        context.own.append((rotated(adapter, keys, positions), values))
        own_keys, own_values = (torch.cat(part, 1) for part in zip(*context.own, strict=True))
        count, total = query.shape[1], own_keys.shape[1]
        row = torch.arange(total - count, total, device=query.device)[:, None]
        hidden = torch.arange(total, device=query.device)[None] > row
        parts = [attend(asked, own_keys, own_values, scale, hidden)]
        if context.keys.shape[1]:
            parts.append(attend(asked, context.keys, context.values, scale))
        merged = merge(parts)
        if self.is_answering:
            self._weigh(context, asked[:, -1], merged.lse[0, :, -1], scale)
        return merged.out[0].to(query.dtype)

    def _choose(self, layer: int, query: Tensor, scale: float) -> LayerContext:
        started = time.perf_counter()
        units = self._units(layer, query[:, self._asking], scale)
        places = [self._stream.units.places[1 + unit] for unit in units]
        ranges = [place.tokens for place in places]
        chosen_at = time.perf_counter()
        store = self._stream.store
        last = min(layer + self._is_told, store.num_layers - 1)
        for number in range(layer, last + 1):
            if number not in self._ahead:
                self._ahead[number] = store.start_read(number, ranges)
        keys, values = self._ahead.pop(layer).result()
        self.select_s += chosen_at - started
        self.load_s += time.perf_counter() - chosen_at
        return layer_context(self._stream, layer, units, keys, values)

    @property
    def _is_told(self) -> bool:
        """Whether all layers read the same, known before they are reached."""
        return self._told is not None or not self._plan.has_own_scores

    def _units(self, layer: int, asked: Tensor, scale: float) -> list[int]:
        if not self._num_units:
            return []
        means = self._stream.means(layer, self._num_units + 1)[1:]
        scores = self._told
        if not self._is_told:
            scores = scores_of(self._plan.mode, asked, means, scale)
            self.scores[layer] = scores.cpu()
        units = chosen(self._plan, scores, self._num_units)
        self.coverage[layer] = coverage_of(asked, means, scale, units)
        return units

    def _weigh(self, context: LayerContext, asked: Tensor, lse: Tensor, scale: float) -> None:
        """Note the share of attention of each unit, the largest over heads."""
        heads = context.keys.shape[0]
        grouped = asked.float().unflatten(0, (heads, -1))
        logits = torch.einsum("hgd,htd->hgt", grouped, context.keys.float()) * scale
        shares = (logits - lse.unflatten(0, (heads, -1))[..., None]).exp().flatten(0, 1)
        for unit, span in zip(context.units, context.spans, strict=True):
            share = float(shares[:, span.start : span.stop].sum(1).max())
            self.masses[unit] = max(float(self.masses[unit]), share)


def layer_context(
    stream: VideoStream, layer: int, units: Sequence[int], keys: Tensor, values: Tensor
) -> LayerContext:
    """Put units that were read behind the opening, close together.

    Parameters
    ----------
    stream : VideoStream
    layer : int
    units : sequence of int
        Counted from the first frame's, in the order of time.
    keys, values : Tensor, shape (num_kv_heads, num_tokens, dim)
        Not rotated.
    """
    opening_keys, opening_values, opening_positions = stream.opening(layer)
    first = stream.units.places[0]
    places = [stream.units.places[1 + unit] for unit in units]
    positions, end = laid_out(places, first.advance, len(first.positions))
    turned = rotated(
        stream.adapter,
        torch.cat([opening_keys, keys], 1),
        torch.cat([opening_positions, positions], 1),
    )
    spans, start = [], first.num_tokens
    for place in places:
        spans.append(range(start, start + place.num_tokens))
        start += place.num_tokens
    return LayerContext(turned, torch.cat([opening_values, values], 1), list(units), spans, end)
