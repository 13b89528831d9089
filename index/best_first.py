"""The exact order in which a tree of boxes is looked into, one node at a time. For comparison.

It is what searches in rounds come close to: the leaves come out as if all of them had been scored
and sorted, but a node's children are only looked at when nothing better is left.
"""

import heapq
from collections.abc import Callable, Iterator

from offload.kernels.boxes import BoxTree


def best_first(tree: BoxTree, score: Callable[[int], float]) -> Iterator[int]:
    """Yield the leaves, the best first; of equal ones the earlier first.

    Parameters
    ----------
    tree : BoxTree
    score : callable
        Of a node by its number; that of a child is no higher than its parent's. Called once for
        each node that is looked at.
    """
    starts = tree.starts
    # Inner nodes come before leaves of the same score, among which an earlier one may be hidden.
    heap = [(-score(node), False, node) for node in range(starts[-2], starts[-1])]
    if len(tree.levels) == 1:
        heap = [(worth, True, node) for worth, _, node in heap]
    heapq.heapify(heap)
    while heap:
        _, is_leaf, node = heapq.heappop(heap)
        if is_leaf:
            yield node
            continue
        level = next(k for k in range(1, len(tree.levels)) if node < starts[k + 1])
        first = starts[level - 1] + (node - starts[level]) * tree.fanout
        for child in range(first, min(first + tree.fanout, starts[level])):
            heapq.heappush(heap, (-score(child), level == 1, child))
