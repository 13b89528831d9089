"""Attention while a question is asked: each layer reads the units that it chooses."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from offload.kernels.reference import merge
from offload.video import layers
from offload.video.retrieval import RetrievalPlan, chosen, scores_of
from offload.video.rotate import attend, rotated
from offload.video.stream import VideoStream
from offload.video.units import laid_out


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
        plan, scores = self._plan, self._told
        if scores is None and plan.mode in ("rekv", "tokmax"):
            means = self._stream.means(layer, self._num_units + 1)[1:]
            scores = scores_of(plan.mode, query[:, self._asking], means, scale)
            self.scores[layer] = scores.cpu()
        units = chosen(plan, scores, self._num_units) if self._num_units else []
        return read_context(self._stream, layer, units)

    def _weigh(self, context: LayerContext, asked: Tensor, lse: Tensor, scale: float) -> None:
        """Note the share of attention of each unit, the largest over heads."""
        heads = context.keys.shape[0]
        grouped = asked.float().unflatten(0, (heads, -1))
        logits = torch.einsum("hgd,htd->hgt", grouped, context.keys.float()) * scale
        shares = (logits - lse.unflatten(0, (heads, -1))[..., None]).exp().flatten(0, 1)
        for unit, span in zip(context.units, context.spans, strict=True):
            share = float(shares[:, span.start : span.stop].sum(1).max())
            self.masses[unit] = max(float(self.masses[unit]), share)


def read_context(stream: VideoStream, layer: int, units: Sequence[int]) -> LayerContext:
    """Read units from the tiers and put them behind the opening, close together."""
    opening_keys, opening_values, opening_positions = stream.opening(layer)
    first = stream.units.places[0]
    places = [stream.units.places[1 + unit] for unit in units]
    positions, end = laid_out(places, first.advance, len(first.positions))
    keys, values = stream.store.read(layer, [place.tokens for place in places])
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
