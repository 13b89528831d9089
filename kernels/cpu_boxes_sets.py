"""Rounds of a search in a tree of boxes, one set of tokens after the other. Needs numba."""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offload.kernels.cpu_boxes_bounds import score_level
from offload.kernels.cpu_intrinsics import exp
from offload.kernels.cpu_scan_tables import FLOATS
from offload.kernels.cpu_select import cut_at, ordered

F32 = np.float32

_OPEN, _ACCEPTED, _REJECTED, _SPLIT = 1, 2, 3, 4
_NOTHING = F32(-1e30)


class Tree(NamedTuple):
    """The nodes of a ``BoxTree`` as arrays; ``logs`` are those of ``counts``.

    Without the boxes, so that kernels for these are all that is compiled for each dtype.
    """

    starts: NDArray[np.int64]
    fanout: int
    counts: NDArray[np.int16]
    logs: NDArray[np.float32]
    first: NDArray[np.int64]


class Asked(NamedTuple):
    """What is searched for.

    Attributes
    ----------
    query : float32 [num_heads, num_queries, key_dim]
    budget, looked_into : int
        Tokens that are found, and those of the nodes that are kept in a round.
    patience : int
        Zero: every search begins at the top.
    is_max, is_flat : bool
        Whether a node's score is its largest share, else the sum; and whether all leaves are
        scored.
    lean : float32
        See ``BoxRules``.
    """

    query: NDArray[np.float32]
    budget: int
    looked_into: int
    patience: int
    is_max: bool
    is_flat: bool
    lean: np.float32


class FoundSets(NamedTuple):
    """Where results go; ``split`` and ``slack`` begin as the last search left them."""

    ids: NDArray[np.int64]
    split: NDArray[np.uint8]
    slack: NDArray[np.float32]
    num_scored: NDArray[np.int64]


class _Seen(NamedTuple):
    """The nodes that were scored, in that order.

    Attributes
    ----------
    node, state, level : int32, uint8, uint8 [num_nodes]
    child : int32 [num_nodes]
        Place of the first child of what was split.
    upper, lower : float32 [num_queries, num_nodes]
    rank : float32 [num_queries, num_nodes]
        Where between them a node is ranked.
    weight : float32 [num_nodes]
        Log of the tokens, or next to nothing for what was split.
    score : float32 [num_nodes]
    total : float32 [num_queries]
        What normalises it.
    """

    node: NDArray[np.int32]
    state: NDArray[np.uint8]
    level: NDArray[np.uint8]
    child: NDArray[np.int32]
    upper: NDArray[np.float32]
    lower: NDArray[np.float32]
    rank: NDArray[np.float32]
    weight: NDArray[np.float32]
    score: NDArray[np.float32]
    total: NDArray[np.float32]


@njit(nogil=True, cache=True)
def search_sets(
    share: int,
    step: int,
    tree: Tree,
    boxes: NDArray[np.int64],
    like: NDArray[Any],
    asked: Asked,
    out: FoundSets,
) -> None:
    """Search for sets ``share``, ``share + step`` and so on; boxes as in ``score_level``."""
    num_heads, group = asked.query.shape[0], asked.query.shape[1]
    num_sets, num_nodes = out.split.shape
    per_set = num_heads // num_sets
    num_queries = per_set * group
    seen = _Seen(
        np.empty(num_nodes, np.int32),
        np.empty(num_nodes, np.uint8),
        np.empty(num_nodes, np.uint8),
        np.empty(num_nodes, np.int32),
        np.empty((num_queries, num_nodes), np.float32),
        np.empty((num_queries, num_nodes), np.float32),
        np.empty((num_queries, num_nodes), np.float32),
        np.empty(num_nodes, np.float32),
        np.empty(num_nodes, np.float32),
        np.empty(num_queries, np.float32),
    )
    for number in range(share, num_sets, step):
        split, slack = out.split[number], out.slack[number]
        known, count = 0, _begin(tree, asked, split, seen)
        while True:
            for head in range(per_set):
                place = number * per_set + head
                _look(tree, boxes, like, asked.query, place, head * group, seen, known, count)
            _rank(seen, known, count, asked.lean)
            _normalise(seen, count)
            _score(seen, count, asked.is_max)
            if known:
                _learn_slack(tree, seen, known, slack)
            known = count
            if asked.is_flat:
                break
            count = _look_closer(tree, asked, slack, seen, count)
            if count == known:
                break
        out.num_scored[number] = per_set * count
        _take(tree, asked.budget, seen, count, out.ids[number])
        if asked.patience and not asked.is_flat:
            _leave(tree, asked.patience, seen, count, split)


@njit(nogil=True, cache=True)
def _begin(tree: Tree, asked: Asked, split: NDArray[np.uint8], seen: _Seen) -> int:
    """List the nodes to begin with; return how many there are."""
    top = len(tree.starts) - 2
    if asked.is_flat:
        return _open(tree, seen, 0, 0, 0, tree.starts[1])
    count = 0
    if asked.patience == 0:
        return _open(tree, seen, 0, top, tree.starts[top], tree.starts[top + 1])
    is_open = np.zeros(len(split), np.uint8)
    is_open[tree.starts[top] :] = 1
    for level in range(top, -1, -1):
        start = tree.starts[level]
        for node in range(start, tree.starts[level + 1]):
            if is_open[node] and level > 0 and split[node] > 0:
                first, stop = _children(tree, level, node)
                is_open[first:stop] = 1
            elif is_open[node]:
                count = _open(tree, seen, count, level, node, node + 1)
    return count


@njit(nogil=True, cache=True)
def _children(tree: Tree, level: int, node: int) -> tuple[int, int]:
    first = tree.starts[level - 1] + (node - tree.starts[level]) * tree.fanout
    return first, min(first + tree.fanout, tree.starts[level])


@njit(nogil=True, cache=True)
def _open(tree: Tree, seen: _Seen, count: int, level: int, first: int, stop: int) -> int:
    """Add nodes to the list; return its new length."""
    for node in range(first, stop):
        seen.node[count], seen.state[count], seen.level[count] = node, _OPEN, level
        seen.weight[count] = tree.logs[node]
        count += 1
    return count


@njit(nogil=True, cache=True)
def _look(
    tree: Tree,
    boxes: NDArray[np.int64],
    like: NDArray[Any],
    query: NDArray[np.float32],
    head: int,
    first_query: int,
    seen: _Seen,
    first: int,
    stop: int,
) -> None:
    """Find the bounds of the nodes ``first`` to ``stop`` of the list."""
    while first < stop:
        level, last = seen.level[first], first
        while last < stop and seen.level[last] == level:
            last += 1
        score_level(
            query[head],
            boxes[level],
            like,
            head,
            seen.node[first:last] - tree.starts[level],
            seen.upper[first_query : first_query + query.shape[1], first:last],
            seen.lower[first_query : first_query + query.shape[1], first:last],
        )
        first = last


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _rank(seen: _Seen, first: int, stop: int, lean: np.float32) -> None:
    """Place the nodes ``first`` to ``stop`` of the list between their bounds."""
    for q in range(len(seen.rank)):
        upper, lower, rank = seen.upper[q], seen.lower[q], seen.rank[q]
        for i in range(first, stop):
            rank[i] = upper[i] - (F32(1) - lean) * (upper[i] - lower[i])


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _normalise(seen: _Seen, count: int) -> None:
    """Set the log of what the open, accepted and rejected nodes weigh at most, for each query."""
    for q in range(len(seen.total)):
        rank, top, total = seen.rank[q], _NOTHING, F32(0)
        for i in range(count):
            top = max(top, rank[i] + seen.weight[i])
        for i in range(count):
            total += exp(rank[i] + seen.weight[i] - top)
        seen.total[q] = top + F32(math.log(total))


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _score(seen: _Seen, count: int, is_max: bool) -> None:
    score = seen.score
    for i in range(count):
        score[i] = seen.rank[0, i] - seen.total[0]
    for q in range(1, len(seen.total)):
        rank, total = seen.rank[q], seen.total[q]
        for i in range(count):
            score[i] = max(score[i], rank[i] - total)
    if is_max:
        return
    for i in range(count):
        score[i] = _sum(seen.rank, seen.total, i, score[i])


@njit(nogil=True, cache=True, fastmath=FLOATS)
def _sum(
    bounds: NDArray[np.float32], total: NDArray[np.float32], i: int, top: np.float32
) -> np.float32:
    """Return the log of the sum of a node's shares; that of the largest is known."""
    share = F32(0)
    for q in range(len(total)):
        share += exp(bounds[q, i] - total[q] - top)
    return top + F32(math.log(share))


@njit(nogil=True, cache=True)
def _least(seen: _Seen, i: int, is_max: bool) -> np.float32:
    """Return the share of the softmax that a token of a node surely has, as ``_score`` does."""
    top = seen.lower[0, i] - seen.total[0]
    for q in range(1, len(seen.total)):
        top = max(top, seen.lower[q, i] - seen.total[q])
    return top if is_max else _sum(seen.lower, seen.total, i, top)


@njit(nogil=True, cache=True)
def _learn_slack(tree: Tree, seen: _Seen, known: int, slack: NDArray[np.float32]) -> None:
    """Note how much lower the best children are than the nodes that were just split."""
    gaps, number = np.zeros(len(slack), np.float32), np.zeros(len(slack), np.int64)
    for i in range(known):
        # The children of what was split before are among those that were known.
        if seen.state[i] != _SPLIT or seen.child[i] < known:
            continue
        level, best = seen.level[i], _NOTHING
        first, stop = _children(tree, level, seen.node[i])
        for place in range(seen.child[i], seen.child[i] + stop - first):
            best = max(best, seen.score[place])
        gaps[level] += seen.score[i] - best
        number[level] += 1
    for level in range(1, len(slack)):
        if number[level]:
            mean = gaps[level] / F32(number[level])
            rate = F32(0.25) if slack[level] != 0 else F32(1)
            slack[level] += rate * (mean - slack[level])


@njit(nogil=True, cache=True)
def _look_closer(
    tree: Tree, asked: Asked, slack: NDArray[np.float32], seen: _Seen, count: int
) -> int:
    """Reject, accept and split what is open; return the new length of the list."""
    expected, score = np.empty(count, np.uint32), np.empty(count, np.uint32)
    tokens, place = np.empty(count, np.int16), np.empty(count, np.int32)
    number, is_done, lost = 0, True, np.cumsum(slack)
    for i in range(count):
        if seen.state[i] == _OPEN or seen.state[i] == _ACCEPTED:
            expected[number] = ordered(seen.score[i] - lost[seen.level[i]])
            score[number] = ordered(seen.score[i])
            tokens[number], place[number] = tree.counts[seen.node[i]], i
            is_done &= seen.state[i] == _ACCEPTED or seen.level[i] == 0
            number += 1
    if is_done and asked.patience == 0:
        return count
    least = cut_at(expected[:number], tokens[:number], asked.looked_into)[0]
    read = (
        np.uint32(0)
        if is_done
        else cut_at(score[:number], tokens[:number], max(1, asked.budget))[0]
    )
    for candidate in range(number):
        i = place[candidate]
        if seen.state[i] == _ACCEPTED:
            continue
        if expected[candidate] < least:
            seen.state[i] = _REJECTED
        elif seen.level[i] > 0:
            if ordered(_least(seen, i, asked.is_max)) >= read:
                seen.state[i] = _ACCEPTED
                continue
            seen.state[i], seen.weight[i], seen.child[i] = _SPLIT, _NOTHING, count
            first, stop = _children(tree, seen.level[i], seen.node[i])
            count = _open(tree, seen, count, seen.level[i] - 1, first, stop)
    return count


@njit(nogil=True, cache=True)
def _take(tree: Tree, budget: int, seen: _Seen, count: int, ids: NDArray[np.int64]) -> None:
    """Set the tokens of the best nodes, whole but for the last."""
    keys, tokens = np.empty(count, np.uint32), np.empty(count, np.int16)
    place = np.empty(count, np.int32)
    number = 0
    for i in range(count):
        state = seen.state[i]
        if state == _ACCEPTED or (state == _OPEN and seen.level[i] == 0):
            keys[number], place[number] = ordered(seen.score[i]), i
            tokens[number] = tree.counts[seen.node[i]]
            number += 1
    least, remaining = cut_at(keys[:number], tokens[:number], budget)
    chosen, taken = np.empty(number, np.int32), 0
    for candidate in range(number):
        is_last = keys[candidate] == least
        if keys[candidate] > least or (is_last and remaining > 0):
            remaining -= tokens[candidate] if is_last else 0
            chosen[taken] = candidate
            taken += 1
    chosen = chosen[:taken]
    order = np.argsort(~keys[chosen], kind="mergesort")
    filled = 0
    for rank in range(taken):
        node = seen.node[place[chosen[order[rank]]]]
        first = tree.first[node]
        for token in range(first, first + min(tree.counts[node], budget - filled)):
            ids[filled] = token
            filled += 1
    ids[filled:] = -1


@njit(nogil=True, cache=True)
def _leave(tree: Tree, patience: int, seen: _Seen, count: int, split: NDArray[np.uint8]) -> None:
    """Set which nodes the next search finds split, and since when for nothing."""
    is_rejected, is_split = np.zeros(len(split), np.bool_), split > 0
    for i in range(count):
        is_rejected[seen.node[i]] = seen.state[i] == _REJECTED
        is_split[seen.node[i]] = seen.state[i] == _SPLIT
    for level in range(1, len(tree.starts) - 1):
        for node in range(tree.starts[level], tree.starts[level + 1]):
            if not is_split[node]:
                split[node] = 0
                continue
            first, stop = _children(tree, level, node)
            steps = max(split[node], 1) + 1 if is_rejected[first:stop].all() else 1
            split[node] = steps if steps <= patience else 0
