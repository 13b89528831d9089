"""A graph over the keys of one head whose edges are what queries, not keys, find alike.

The bipartite projection of RoarGraph (arXiv 2408.08933, section 4), which RetrievalAttention (arXiv
2409.10516, section 3.3) builds from the queries of the prefill: queries lie elsewhere than keys, so
the neighbours of a key among keys say little about what a query finds next. Ours differs in three
things; docs/ann.md says what each is worth:

* every key near a query is a pivot, not only the nearest: keys are linked by how many queries find
  both (``pivots=1`` is the published star);
* what lies between two keys is judged by how differently queries see them, the distance under the
  covariance of the queries, when edges are chosen;
* each key is linked to its nearest within a block of tokens too, instead of a search of the graph
  for every key. One edge of each is left free, so that keys without a way to them get one.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.index.graph_settings import GraphSettings
from offload.index.orphans import attach_orphans

_RIDGE = 0.01
"""Share of the mean variance added to every direction: few queries leave some without any."""

_BLOCK_TOKENS = 4096
"""Where the nearest keys are looked for. The whole context instead gains nothing (16K keys)."""

_LOCAL = 8
_SHARED = 24
"""Candidates for the edges of a key: nearest in its block, and found together with it most.

With twice as many (and twice the next two) a graph takes twice as long to build; its recall for
what a search reads is the same, at 16K keys.
"""

_QUERIES_PER_KEY = 16
"""Of the queries that find a key, those that rank it best are asked what else they find."""

_BACKWARD = 24
"""Edges towards a key that may become edges away from it."""

_ROWS = 512
"""Keys at a time; bounds the workspace at some 50 MiB."""

_LOGITS = 1 << 24
"""Logits at a time: 64 MiB."""


@dataclass(frozen=True, slots=True)
class Graph:
    """Edges between the keys of one head.

    Attributes
    ----------
    neighbours : Tensor, int32 [num_keys, degree]
        ``-1`` where a key has fewer.
    entries : Tensor, int32 [num_entries]
        Where a search begins: the keys that most queries find.
    """

    neighbours: Tensor
    entries: Tensor


def build_graph(keys: Tensor, queries: Tensor, settings: GraphSettings) -> Graph:
    """Link the keys of one head.

    Parameters
    ----------
    keys : Tensor, shape (num_keys, key_dim), float32
    queries : Tensor, shape (num_queries, key_dim), float32
        Of all heads of the group.
    settings : GraphSettings
    """
    num_keys, degree = keys.shape[0], settings.degree
    found = nearest_keys(queries, keys, min(settings.num_nearest, num_keys))
    rows = as_queries_see(keys, queries)
    together = _found_together(found, num_keys, settings.pivots)
    candidates = torch.cat([together, _nearest_in_block(rows)], 1)
    forward = _prune(rows, candidates, degree)
    neighbours = _prune(rows, torch.cat([forward, _reversed(forward)], 1), degree - 1)
    popular = torch.bincount(found.flatten(), minlength=num_keys)
    entries = popular.argsort(descending=True, stable=True)[: settings.num_entries]
    neighbours = attach_orphans(neighbours, rows, entries)
    return Graph(neighbours.int(), entries.int())


def nearest_keys(queries: Tensor, keys: Tensor, count: int) -> Tensor:
    """Return the keys with the largest inner products, best first, int64 [num_queries, count]."""
    parts = queries.split(max(1, _LOGITS // keys.shape[0]))
    return torch.cat([(part @ keys.mT).topk(count, 1).indices for part in parts])


def as_queries_see(keys: Tensor, queries: Tensor) -> Tensor:
    """Return rows whose squared distance is the variance of ``query @ (one key - other key)``.

    Parameters
    ----------
    keys : Tensor, shape (num_keys, key_dim), float32
    queries : Tensor, shape (num_queries, key_dim), float32

    Returns
    -------
    Tensor, shape (num_keys, key_dim)
    """
    centred = queries - queries.mean(0)
    covariance = centred.mT @ centred / queries.shape[0]
    variances, directions = torch.linalg.eigh(covariance)
    floor = _RIDGE * float(variances.mean()) + 1e-12
    seen: Tensor = keys @ (directions * (variances.clamp_min(0) + floor).sqrt())
    return seen


def _found_together(found: Tensor, num_keys: int, pivots: int) -> Tensor:
    """Return the keys that most queries find together with each, int64 [num_keys, _SHARED]."""
    finders = _best_finders(found[:, :pivots], num_keys)
    nothing = found.new_full((1, found.shape[1]), -1)
    lists = torch.cat([found, nothing])
    parts = []
    for own in _numbers(num_keys, found.device):
        together = lists[finders[own]].flatten(1)
        together = together.masked_fill(together == own.unsqueeze(1), -1).sort(1).values
        parts.append(_most_frequent(together, _SHARED))
    return torch.cat(parts)


def _best_finders(found: Tensor, num_keys: int) -> Tensor:
    """Return the queries that rank each key best, int64 [num_keys, _QUERIES_PER_KEY], or -1."""
    num_queries, depth = found.shape
    by_rank = found.mT.flatten()
    order = by_rank.argsort(stable=True)
    key = by_rank[order]
    place = torch.arange(len(key), device=key.device) - torch.searchsorted(key, key)
    kept = place < _QUERIES_PER_KEY
    finders = found.new_full((num_keys, _QUERIES_PER_KEY), -1)
    finders[key[kept], place[kept]] = order[kept] % num_queries
    return finders[:, : min(_QUERIES_PER_KEY, num_queries * depth)]


def _most_frequent(ascending: Tensor, count: int) -> Tensor:
    """Return the most frequent numbers of each ascending row, -1 where there are no more."""
    places = torch.arange(ascending.shape[1], device=ascending.device).expand_as(ascending)
    ends = torch.ones_like(ascending, dtype=torch.bool)
    ends[:, :-1] = ascending[:, 1:] != ascending[:, :-1]
    before = torch.where(ends, places, -1).cummax(1).values.roll(1, 1)
    before[:, 0] = -1
    lengths = torch.where(ends & (ascending >= 0), places - before, 0)
    best = lengths.topk(min(count, lengths.shape[1]), 1)
    return torch.where(best.values > 0, ascending.gather(1, best.indices), -1)


def _nearest_in_block(rows: Tensor) -> Tensor:
    """Return the nearest rows of the same block, int64 [num_keys, at most _LOCAL]."""
    num_keys = rows.shape[0]
    parts = []
    for start in range(0, num_keys, _BLOCK_TOKENS):
        # The last block is made whole with what lies before it.
        first = max(0, min(start, num_keys - _BLOCK_TOKENS))
        block = rows[first : first + _BLOCK_TOKENS]
        distance = torch.cdist(block[start - first :], block)
        distance.diagonal(start - first).fill_(torch.inf)
        count = min(_LOCAL, num_keys - 1)
        parts.append(distance.topk(count, 1, largest=False).indices + first)
    return torch.cat(parts)


def _prune(rows: Tensor, candidates: Tensor, degree: int) -> Tensor:
    """Keep the nearest candidates that no kept one is nearer to than the key itself.

    Parameters
    ----------
    rows : Tensor, shape (num_keys, dim)
    candidates : Tensor, int64 [num_keys, num_candidates]
        ``-1`` for none; some may occur twice.

    Returns
    -------
    Tensor, int64 [num_keys, degree]
    """
    kept = []
    for own in _numbers(rows.shape[0], rows.device):
        some, distance = _ascending(rows, own, candidates[own])
        there = rows[some.clamp_min(0)]
        apart = torch.cdist(there, there)
        # What is nearer to a kept candidate than to the key is reached through that one.
        hidden = (some < 0) | torch.isinf(distance)
        chosen = torch.zeros_like(hidden)
        for place in range(some.shape[1]):
            chosen[:, place] = ~hidden[:, place]
            hides = (apart[:, place] < distance) & chosen[:, place : place + 1]
            hidden |= hides
        number = chosen.cumsum(1) - 1
        rank = torch.where(chosen & (number < degree), number, degree)
        out = some.new_full((len(own), degree + 1), -1).scatter_(1, rank, some)
        kept.append(out[:, :degree])
    return torch.cat(kept)


def _ascending(rows: Tensor, own: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Sort candidates by distance; those that are none, the key or a repetition are at infinity."""
    ordered = candidates.sort(1).values
    unwanted = (ordered < 0) | (ordered == own.unsqueeze(1))
    unwanted[:, 1:] |= ordered[:, 1:] == ordered[:, :-1]
    distance = (rows[ordered.clamp_min(0)] - rows[own].unsqueeze(1)).norm(dim=-1)
    distance, order = distance.masked_fill(unwanted, torch.inf).sort(dim=1, stable=True)
    return ordered.gather(1, order), distance


def _reversed(neighbours: Tensor) -> Tensor:
    """Return where edges come from, the first ``_BACKWARD`` of each key, -1 for none."""
    num_keys, degree = neighbours.shape
    target = neighbours.flatten()
    order = target.argsort(stable=True)
    order = order[target[order] >= 0]
    target = target[order]
    place = torch.arange(len(target), device=target.device) - torch.searchsorted(target, target)
    kept = place < _BACKWARD
    sources = neighbours.new_full((num_keys, _BACKWARD), -1)
    sources[target[kept], place[kept]] = order[kept] // degree
    return sources


def _numbers(count: int, device: torch.device) -> Iterator[Tensor]:
    yield from torch.arange(count, device=device).split(_ROWS)
