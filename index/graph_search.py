"""Best-first search of a graph over keys, for many queries at once."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Found:
    """What a search came upon.

    Attributes
    ----------
    ids : Tensor, int64 [num_queries, beam]
        Best first; ``-1`` where fewer were reached.
    scores : Tensor, float32 [num_queries, beam]
        Inner products; ``-inf`` where there is no id.
    num_compared : int
        Keys that were compared with a query, over all queries.
    num_expanded : int
        Keys whose edges were read, over all queries.
    """

    ids: Tensor
    scores: Tensor
    num_compared: int
    num_expanded: int


def best_first(
    query: Tensor,
    keys: Tensor,
    neighbours: Tensor,
    entries: Tensor,
    head_of: Tensor,
    *,
    beam: int,
    width: int,
) -> Found:
    """Follow the edges of the best keys seen so far until they lead to nothing better.

    Parameters
    ----------
    query : Tensor, shape (num_queries, key_dim), float32
    keys : Tensor, shape (num_heads, num_keys, key_dim)
    neighbours : Tensor, int32 [num_heads, num_keys, degree]
        ``-1`` where a key has fewer.
    entries : Tensor, int32 [num_heads, num_entries]
    head_of : Tensor, int64 [num_queries]
        Whose keys a query is compared with.
    beam : int
        Keys that are remembered; all of these are expanded in the end.
    width : int
        Keys expanded at a time. More are fewer and larger steps, and some comparisons that the
        best of them would have made needless.
    """
    num_queries, num_keys = query.shape[0], keys.shape[1]
    head = head_of.unsqueeze(1)
    # One more place, for the ids that are none.
    seen = torch.zeros(num_queries, num_keys + 1, dtype=torch.bool, device=query.device)
    seen[:, num_keys] = True
    queue = _Queue(
        query.new_full((num_queries, beam), -torch.inf),
        torch.full((num_queries, beam), -1, device=query.device),
        torch.ones(num_queries, beam, dtype=torch.bool, device=query.device),
    )
    reached = entries[head_of].long()
    num_compared = num_expanded = 0
    while True:
        reached, fresh = _unseen(reached, seen)
        num_compared += int(fresh.sum())
        scores = torch.bmm(keys[head, reached.clamp_max(num_keys - 1)].float(), query.unsqueeze(2))
        scores = scores.squeeze(2).masked_fill(~fresh, -torch.inf)
        queue.push(scores, reached.masked_fill(~fresh, -1))
        nodes, live = queue.pop(min(width, beam))
        if not bool(live.any()):
            break
        num_expanded += int(live.sum())
        edges = neighbours[head, nodes.clamp_min(0)].masked_fill(~live.unsqueeze(2), -1)
        reached = edges.flatten(1).long()
    return Found(queue.ids, queue.scores, num_compared, num_expanded)


@dataclass(slots=True)
class _Queue:
    """The best keys of each query so far, best first, and which of them were expanded."""

    scores: Tensor
    ids: Tensor
    expanded: Tensor

    def push(self, scores: Tensor, ids: Tensor) -> None:
        beam = self.scores.shape[1]
        self.scores, order = torch.cat([self.scores, scores], 1).topk(beam, 1)
        self.ids = torch.cat([self.ids, ids], 1).gather(1, order)
        self.expanded = torch.cat([self.expanded, torch.isinf(scores)], 1).gather(1, order)

    def pop(self, width: int) -> tuple[Tensor, Tensor]:
        """Return the best that were not expanded, and whether there were so many."""
        scores, places = self.scores.masked_fill(self.expanded, -torch.inf).topk(width, 1)
        self.expanded.scatter_(1, places, value=True)
        return self.ids.gather(1, places), ~torch.isinf(scores)


def _unseen(ids: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Mark ids as seen; return them and which of them are new, once if they occur twice."""
    nobody = seen.shape[1] - 1
    ids = ids.masked_fill(ids < 0, nobody).sort(1).values
    fresh = ~seen.gather(1, ids)
    fresh[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    seen.scatter_(1, ids, value=True)
    return ids, fresh
