"""Search a tree of boxes in rounds; this is the definition, in plain torch.

A round scores the nodes that the last one opened. From then on a node is open, or it is rejected:
the best ones, whose tokens come to ``over`` times the budget, are kept. Nodes that are sure to be
read (even their lower bound reaches what the budget takes) are accepted whole; the others that are
kept are replaced by their children, until only leaves are open. The best of those are taken.

A node's score is the share of the softmax that its tokens may have: at most, or as far below that
as the rules lean; combined over the queries of a set. What normalises it is the same for all nodes,
so by upper bounds no child has a higher one than its parent. Where a search goes on from the last
one, nodes of all levels compete in one round; a parent counts without the ``slack`` that its best
leaf will probably lose, or gain.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from offload.kernels.boxes import BoxCut, BoxHits, BoxRules, BoxTree, bounds
from offload.kernels.scan import Combine, combine_shares

UNSEEN, OPEN, ACCEPTED, REJECTED, SPLIT = range(5)
"""What a node is in a search. Those that are open, accepted or rejected cover every token once."""

SLACK_RATE = 0.25
"""Weight of a search in the mean slack."""


def search_boxes(
    tree: BoxTree,
    query: Tensor,
    budget: int,
    group: Combine,
    rules: BoxRules,
    past: BoxCut | None = None,
) -> BoxHits:
    """Return the tokens that the queries of each set need most. Thread-safe: no state.

    Parameters
    ----------
    tree : BoxTree
    query : Tensor, shape (num_heads, num_queries, key_dim), float32
        Scaled.
    budget : int
        Tokens per set, at most.
    group : {"max", "sum"}
        How the shares that queries give a node are combined.
    rules : BoxRules
    past : BoxCut, optional
        What the last search left.
    """
    search = _Search(tree, query, min(budget, tree.num_tokens), group, rules, past)
    while not search.is_certified() and search.look_closer():
        pass
    return search.hits()


def first_states(
    tree: BoxTree, rules: BoxRules, num_sets: int, budget: int, past: BoxCut | None
) -> Tensor:
    """Return what each node is when a search begins, uint8 ``[num_sets, num_nodes]``."""
    starts = tree.starts
    state = tree.counts.new_zeros((num_sets, starts[-1]), dtype=torch.uint8)
    if rules.is_flat(budget, tree.num_tokens):
        state[:, : starts[1]] = OPEN
        state[:, starts[1] :] = SPLIT
        return state
    state[:, starts[-2] :] = OPEN
    if past is not None and rules.patience is not None:
        for number in range(len(tree.levels) - 1, 0, -1):
            nodes = slice(starts[number], starts[number + 1])
            _split(tree, state, number, past.split[:, nodes] > 0)
    return state


def _split(tree: BoxTree, state: Tensor, number: int, chosen: Tensor) -> None:
    """Replace chosen nodes of a level, bool ``[num_sets, num_nodes]``, by their children."""
    starts = tree.starts
    own = state[:, starts[number] : starts[number + 1]]
    below = state[:, starts[number - 1] : starts[number]]
    own[chosen] = SPLIT
    below[chosen.repeat_interleave(tree.fanout, 1)[:, : below.shape[1]]] = OPEN


@dataclass(slots=True)
class _Scores:
    """Of all nodes seen so far; what normalises them changes with every round.

    Attributes
    ----------
    shares, least : Tensor, shape (num_sets, num_queries, num_nodes)
        Logs of the share of the softmax that a token of a node has at most, and at least.
    score, sure : Tensor, shape (num_sets, num_nodes)
        What nodes are ranked by, and the latter, combined.
    """

    shares: Tensor
    least: Tensor
    score: Tensor
    sure: Tensor


class _Search:
    """One search, in progress."""

    def __init__(
        self,
        tree: BoxTree,
        query: Tensor,
        budget: int,
        group: Combine,
        rules: BoxRules,
        past: BoxCut | None,
    ) -> None:
        self.tree, self.query, self.group, self.rules, self.past = tree, query, group, rules, past
        self.budget, self.is_flat = budget, rules.is_flat(budget, tree.num_tokens)
        self.num_sets = tree.num_heads if rules.scope == "kv_head" else 1
        shape = (*query.shape[:2], tree.starts[-1])
        self.upper, self.lower = (query.new_full(shape, -math.inf) for _ in range(2))
        self.state = first_states(tree, rules, self.num_sets, budget, past)
        self.level = torch.repeat_interleave(
            torch.arange(len(tree.levels)), torch.tensor([level.num_nodes for level in tree.levels])
        ).to(query.device)
        self.slack = query.new_zeros(self.num_sets, len(tree.levels))
        if past is not None:
            self.slack = past.slack.clone()
        self.num_scored = 0
        self.certified = query.new_zeros(self.num_sets, dtype=torch.bool)
        self.taken = self.certified.new_zeros(self.state.shape)
        self.scores = self._score(self.state == OPEN)

    def _score(self, wanted: Tensor) -> _Scores:
        """Look at more boxes, and score all that were seen."""
        starts, heads = self.tree.starts, wanted.expand(self.tree.num_heads, -1)
        for level, start, stop in zip(self.tree.levels, starts, starts[1:], strict=False):
            mask = heads[:, start:stop]
            counts = mask.sum(1)
            most = int(counts.max())
            self.num_scored += int(counts.sum())
            if most == 0:
                continue
            # Nodes that are not wanted fill up the shorter lists.
            nodes = mask.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
            known = mask.gather(1, nodes).unsqueeze(1)
            places = (nodes + start).unsqueeze(1).expand(-1, self.query.shape[1], -1)
            found = bounds(level, self.query, nodes)
            for kept, new in zip((self.upper, self.lower), found, strict=True):
                kept.scatter_(2, places, torch.where(known, new, kept.gather(2, places)))
        return self._normalised()

    def _normalised(self) -> _Scores:
        shape = (self.num_sets, -1, self.upper.shape[2])
        upper, lower = self.upper.view(shape), self.lower.view(shape)
        middling = torch.lerp(lower, upper, self.rules.lean) if self.rules.lean < 1 else upper
        covering = ((self.state >= OPEN) & (self.state <= REJECTED)).unsqueeze(1)
        weighed = (middling + self.tree.counts.float().log()).masked_fill(~covering, -math.inf)
        total = weighed.logsumexp(-1, keepdim=True)
        shares, least = upper - total, lower - total
        sure = combine_shares(least, self.group)
        return _Scores(shares, least, combine_shares(middling - total, self.group), sure)

    def look_closer(self) -> bool:
        """Reject, accept and split what is open; return whether anything was split."""
        if self.is_flat:
            return False
        counts, score = self.tree.counts.long(), self.scores.score
        kept = (self.state == OPEN) | (self.state == ACCEPTED)
        expected = score - self.slack.cumsum(1)[:, self.level]
        least = _cut(expected, kept, counts, math.ceil(self.rules.over * self.budget))
        read = _cut(score, kept, counts, self.budget)
        self.state[(self.state == OPEN) & (expected < least)] = REJECTED
        inner = (self.state == OPEN) & (self.level > 0)
        sure = inner & (self.scores.sure >= read)
        self.state[sure] = ACCEPTED
        inner &= ~sure
        if not bool(inner.any()):
            return False
        before = self.state == OPEN
        starts = self.tree.starts
        for number in range(len(self.tree.levels) - 1, 0, -1):
            _split(self.tree, self.state, number, inner[:, starts[number] : starts[number + 1]])
        self.scores = self._score((self.state == OPEN) & ~before)
        self._learn_slack(inner)
        return True

    def _learn_slack(self, split: Tensor) -> None:
        """Note how much lower the best children are than the nodes that were split."""
        starts, score = self.tree.starts, self.scores.score
        for number in range(1, len(self.tree.levels)):
            nodes = slice(starts[number], starts[number + 1])
            best = self._children(score, number, -math.inf).amax(-1)
            chosen = split[:, nodes]
            gaps = torch.where(chosen, score[:, nodes] - best, 0.0).sum(1)
            mean = gaps / chosen.sum(1).clamp_min(1)
            old = self.slack[:, number]
            new = torch.where(old != 0, old + SLACK_RATE * (mean - old), mean)
            self.slack[:, number] = torch.where(chosen.any(1), new, old)

    def _children(self, rows: Tensor, number: int, filling: float) -> Tensor:
        """Return what the children of a level's nodes have, ``[num_sets, num_nodes, fanout]``."""
        starts = self.tree.starts
        below = rows[:, starts[number - 1] : starts[number]]
        filled = pad(below, (0, -below.shape[1] % self.tree.fanout), value=filling)
        return filled.view(len(filled), -1, self.tree.fanout)

    def is_certified(self) -> bool:
        """Note for which sets the bounds prove that little is lost; return whether for all."""
        if self.rules.lost_mass is None:
            return False
        open_ = (self.state == OPEN) | (self.state == ACCEPTED)
        self.taken, self.certified = _certify(
            self.scores, open_, self.state == REJECTED, self.tree, self.budget, self.rules.lost_mass
        )
        return bool(self.certified.all())

    def hits(self) -> BoxHits:
        """Return the tokens of the best nodes."""
        self.is_certified()
        ready = (self.state == ACCEPTED) | ((self.state == OPEN) & (self.level == 0))
        ready = torch.where(self.certified.unsqueeze(1), self.taken, ready)
        ids = _take(self.scores.score, ready, self.tree, self.budget)
        cut = BoxCut(self._next_split(), self.slack)
        return BoxHits(ids, cut, self.num_scored, self.certified)

    def _next_split(self) -> Tensor:
        """Return which nodes the next search finds split, and since when for nothing."""
        split = self.state.new_zeros(self.state.shape)
        before = split if self.past is None else self.past.split
        starts, patience = self.tree.starts, self.rules.patience
        if patience is None or self.is_flat:
            return before
        for number in range(1, len(self.tree.levels)):
            nodes = slice(starts[number], starts[number + 1])
            unused = self._children(self.state == REJECTED, number, 1.0).all(-1)
            steps = torch.where(unused, before[:, nodes].clamp_min(1) + 1, 1)
            keep = (self.state[:, nodes] == SPLIT) & (steps <= patience)
            split[:, nodes] = torch.where(keep, steps, 0).to(torch.uint8)
        return split


def _cut(scores: Tensor, chosen: Tensor, counts: Tensor, wanted: int) -> Tensor:
    """Return the score of the last node that it takes to cover so many tokens, the best first.

    Parameters
    ----------
    scores : Tensor, shape (num_sets, num_nodes)
    chosen : Tensor, bool [num_sets, num_nodes]
        The others do not count.
    counts : Tensor, int64 [num_nodes]
    wanted : int
    """
    scores = scores.masked_fill(~chosen, -math.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    covered = torch.where(chosen, counts, 0).gather(1, order).cumsum(1)
    last = (covered < max(1, wanted)).sum(1, keepdim=True).clamp_max(scores.shape[1] - 1)
    return scores.gather(1, order.gather(1, last))


def _take(scores: Tensor, ready: Tensor, tree: BoxTree, budget: int) -> Tensor:
    """Return the tokens of the best nodes that are ready, whole but for the last."""
    scores = scores.masked_fill(~ready, -math.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    lengths = torch.where(ready, tree.counts.long(), 0).gather(1, order)
    stops = lengths.cumsum(1)
    most = min(budget, int(stops[:, -1].max()))
    places = torch.arange(most, device=scores.device).expand(len(scores), -1).contiguous()
    rank = torch.searchsorted(stops, places, right=True).clamp_max(scores.shape[1] - 1)
    offset = places - stops.gather(1, rank) + lengths.gather(1, rank)
    ids = tree.first[order.gather(1, rank)] + offset
    return torch.where(places < stops[:, -1:], ids, -1)


def _certify(
    scores: _Scores, open_: Tensor, rejected: Tensor, tree: BoxTree, budget: int, lost_mass: float
) -> tuple[Tensor, Tensor]:
    """Return the fewest of the best open nodes that surely have enough of the softmax.

    Returns
    -------
    taken : Tensor, bool [num_sets, num_nodes]
    certified : Tensor, bool [num_sets]
        Whether there are so few that the budget holds them.
    """
    order = scores.score.masked_fill(~open_, -math.inf).argsort(dim=1, descending=True, stable=True)
    inside = open_.gather(1, order)
    weights = tree.counts.float().log()

    def ordered(logs: Tensor, mask: Tensor) -> Tensor:
        rows = (logs + weights).masked_fill(~mask.unsqueeze(1), -math.inf)
        return rows.gather(2, order.unsqueeze(1).expand_as(rows))

    have = ordered(scores.least, open_).logcumsumexp(-1)
    left = ordered(scores.shares, open_ | rejected)
    left = pad(left.flip(-1).logcumsumexp(-1).flip(-1)[..., 1:], (0, 1), value=-math.inf)
    is_enough = (left <= have + math.log(lost_mass)).all(1)
    tokens = torch.where(inside, tree.counts.long()[order], 0).cumsum(1)
    is_enough &= inside & (tokens <= budget)
    certified = is_enough.any(1)
    last = is_enough.byte().argmax(1, keepdim=True)
    kept = (torch.arange(order.shape[1], device=order.device) <= last) & inside
    return torch.zeros_like(open_).scatter_(1, order, kept), certified
