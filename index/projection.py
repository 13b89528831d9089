"""The attention-aware graph of RetrievalAttention: keys linked as queries of the prefill see them.

RetrievalAttention (arXiv 2409.10516, section 3.3) searches a graph over the keys with the queries
of decoding, which lie elsewhere than keys; ``graph_build`` says how it is made and how we differ.
It keeps a graph per query head and searches each by itself; here the heads of a group share one
graph, made from the queries of all of them, and what they find is ranked together. What is not read
is forgotten, as there.

A graph does not grow: a run that is joined to another has a graph of its own, searched by itself.
So runs should be long, and short ones, where a graph would compare about as many keys as there are,
are scanned.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from offload.errors import ConfigError
from offload.index.base import Combine, Hits, KeyIndex, agreed, require_finite
from offload.index.candidates import best_of_group
from offload.index.graph_build import Graph, build_graph
from offload.index.graph_search import best_first
from offload.index.graph_settings import GraphSettings

_COMPARED_PER_PLACE = 6
"""Keys that a search compares for each place of its beam; measured at 16K to 128K keys."""


@dataclass(frozen=True, slots=True)
class ProjectionIndex(KeyIndex):
    """All keys, and edges between them.

    Attributes
    ----------
    settings : GraphSettings
    keys : Tensor, shape (num_heads, num_tokens, key_dim)
        A copy, in the dtype given.
    neighbours : Tensor, int32 [num_heads, num_tokens, degree]
        Counted from the first of the segment; ``-1`` where a key has fewer.
    entries : Tensor, int32 [num_heads, num_segments, num_entries]
        Likewise.
    sizes : tuple of int
        Tokens of each segment.
    """

    learns_from_queries = True

    settings: GraphSettings
    keys: Tensor
    neighbours: Tensor
    entries: Tensor
    sizes: tuple[int, ...]

    @classmethod
    def build(
        cls, keys: Tensor, values: Tensor, *, queries: Tensor | None = None, **options: Any
    ) -> Self:
        """Link a run of keys.

        Parameters
        ----------
        keys, values : Tensor
            As ``KeyIndex.build`` says.
        queries : Tensor, shape (num_heads, num_queries, key_dim), optional
            Of the prefill, those of all heads of a group; of any scale. Without them the keys of
            a segment stand in, and its graph is one of the usual kind.
        **options
            Of ``GraphSettings``.

        Raises
        ------
        ConfigError
            A key, value or query is not finite; there are no queries; an option is none.
        """
        settings = GraphSettings(**options)
        require_finite(keys, values)
        if queries is not None:
            _check_queries(queries, keys)
        parts = keys.split(settings.segment_tokens, 1)
        graphs = []
        for part in parts:
            asked = _some(part if queries is None else queries, settings.max_queries)
            graphs.append([_graph(*rows, settings) for rows in zip(part, asked, strict=True)])
        return cls(
            settings,
            keys.clone(memory_format=torch.contiguous_format),
            torch.cat([torch.stack([g.neighbours for g in heads]) for heads in graphs], 1),
            torch.stack([torch.stack([g.entries for g in heads]) for heads in graphs], 1),
            tuple(part.shape[1] for part in parts),
        )

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:  # noqa: D102
        return cls(
            agreed([part.settings for part in parts]),
            torch.cat([part.keys for part in parts], 1),
            torch.cat([part.neighbours for part in parts], 1),
            torch.cat([part.entries for part in parts], 1),
            tuple(size for part in parts for size in part.sizes),
        )

    def prefix(self, num_tokens: int) -> Self:  # noqa: D102
        sizes = self.sizes[: list(accumulate(self.sizes)).index(num_tokens) + 1]
        return type(self)(
            self.settings,
            self.keys[:, :num_tokens],
            self.neighbours[:, :num_tokens],
            self.entries[:, : len(sizes)],
            sizes,
        )

    @property
    def num_heads(self) -> int:  # noqa: D102
        return self.keys.shape[0]

    @property
    def num_tokens(self) -> int:  # noqa: D102
        return self.keys.shape[1]

    def tensors(self) -> Mapping[str, Tensor]:  # noqa: D102
        return {"keys": self.keys, "neighbours": self.neighbours, "entries": self.entries}

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"settings": asdict(self.settings), "sizes": self.sizes}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:  # noqa: D102
        return cls(GraphSettings(**meta["settings"]), **tensors, sizes=tuple(meta["sizes"]))

    def search(  # noqa: D102
        self, query: Tensor, budget: int, group: Combine = "max", past: Hits | None = None
    ) -> Hits:
        found = [self._search(query, budget, number, run) for number, run in self._runs()]
        ids = torch.cat([part.ids for part in found], 2)
        scores = torch.cat([part.scores for part in found], 2)
        best = best_of_group(ids, scores, min(budget, self.num_tokens), group)
        return Hits(best, sum(part.scanned_bytes for part in found))

    def _runs(self) -> Iterator[tuple[int, slice]]:
        stop = 0
        for number, size in enumerate(self.sizes):
            start, stop = stop, stop + size
            yield number, slice(start, stop)

    def _search(self, query: Tensor, budget: int, number: int, run: slice) -> "_Found":
        """Search one segment."""
        keys = self.keys[:, run]
        beam = self.settings.beam_for(keys.shape[1], budget)
        if _is_scanned(keys.shape[1], beam):
            logits = torch.bmm(query, keys.float().mT)
            scores, ids = logits.topk(min(beam, keys.shape[1]), 2)
            return _Found(ids + run.start, scores, query.shape[1] * keys.numel() * keys.itemsize)
        found = best_first(
            query.flatten(0, 1),
            keys,
            self.neighbours[:, run],
            self.entries[:, number],
            torch.arange(query.shape[0], device=query.device).repeat_interleave(query.shape[1]),
            beam=beam,
            width=self.settings.width,
        )
        shape = (*query.shape[:2], beam)
        ids = torch.where(found.ids >= 0, found.ids + run.start, -1)
        scanned = found.num_compared * keys.shape[2] * keys.itemsize
        scanned += found.num_expanded * self.settings.degree * self.neighbours.itemsize
        return _Found(ids.view(shape), found.scores.view(shape), scanned)


@dataclass(frozen=True, slots=True)
class _Found:
    """What the queries found in one segment, ``[num_heads, num_queries, beam]``."""

    ids: Tensor
    scores: Tensor
    scanned_bytes: int


def _check_queries(queries: Tensor, keys: Tensor) -> None:
    num_heads, _, key_dim = keys.shape
    if queries.shape[::2] != (num_heads, key_dim) or queries.shape[1] == 0:
        raise ConfigError(
            f"queries of shape {tuple(queries.shape)} for keys of shape {tuple(keys.shape)}; "
            "every head needs one at least, as wide as its keys"
        )
    finite = torch.isfinite(queries)
    if not bool(finite.all()):
        head, number, _ = (~finite).nonzero()[0].tolist()
        raise ConfigError(f"query {number} of head {head} is not finite")


def _some(rows: Tensor, count: int) -> Tensor:
    """Return at most so many of the rows of each head, spread evenly, in float32."""
    return rows[:, :: -(-rows.shape[1] // count)].float()


def _is_scanned(num_keys: int, beam: int) -> bool:
    return num_keys <= _COMPARED_PER_PLACE * beam


def _graph(keys: Tensor, queries: Tensor, settings: GraphSettings) -> Graph:
    """Link the keys of one head; those of a run that is always scanned have no edges."""
    if _is_scanned(len(keys), settings.beam_for(len(keys), budget=0)):
        neighbours = torch.full((keys.shape[0], settings.degree), -1, device=keys.device)
        return Graph(neighbours.int(), neighbours.new_full((settings.num_entries,), -1).int())
    graph = build_graph(keys.float(), queries, settings)
    missing = settings.num_entries - graph.entries.shape[0]
    return Graph(graph.neighbours, pad(graph.entries, (0, missing), value=-1))
