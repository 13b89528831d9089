"""The search of ``kernels.box_search`` on CPUs with compiled kernels. Needs numba."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offload.kernels.boxes import BoxCut, BoxHits, BoxLevel, BoxRules, BoxTree
from offload.kernels.cpu_boxes_sets import Asked, FoundSets, Tree, search_sets
from offload.kernels.cpu_threads import run_shares
from offload.kernels.scan import Combine

_VIEWS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
"""The numbers by which kernels know what their bits are."""


def supports(tree: BoxTree, query: Tensor, rules: BoxRules) -> bool:
    """Whether ``search_boxes`` here can do what ``kernels.box_search`` would be asked to."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)
    leaves = tree.levels[0].lower
    return query.device.type == "cpu" and leaves.dtype in dtypes and rules.lost_mass is None


def search_boxes(
    tree: BoxTree,
    query: Tensor,
    budget: int,
    group: Combine,
    rules: BoxRules,
    past: BoxCut | None = None,
) -> BoxHits:
    """Search as ``kernels.box_search.search_boxes`` does. Thread-safe: no state."""
    budget, num_nodes = min(budget, tree.num_tokens), len(tree.counts)
    num_sets = tree.num_heads if rules.scope == "kv_head" else 1
    hits = BoxHits(
        torch.empty(num_sets, budget, dtype=torch.int64),
        BoxCut(
            torch.zeros(num_sets, num_nodes, dtype=torch.uint8),
            torch.zeros(num_sets, len(tree.levels)),
        ),
        0,
        torch.zeros(num_sets, dtype=torch.bool),
    )
    if past is not None:
        hits.cut.split.copy_(past.split)
        hits.cut.slack.copy_(past.slack)
    num_scored = np.zeros(num_sets, np.int64)
    out = FoundSets(hits.ids.numpy(), hits.cut.split.numpy(), hits.cut.slack.numpy(), num_scored)
    asked = Asked(
        np.ascontiguousarray(query.numpy()),
        budget,
        max(1, math.ceil(rules.over * budget)),
        rules.patience or 0,
        group == "max",
        rules.is_flat(budget, tree.num_tokens),
        np.float32(rules.lean),
    )
    nodes, levels = _nodes(tree), [_level(level) for level in tree.levels]
    boxes = np.array([_table(arrays) for arrays in levels], np.int64)
    like = levels[0][0].reshape(-1)[:0]

    def kernel(share: int, num_shares: int) -> None:
        search_sets(share, num_shares, nodes, boxes, like, asked, out)

    run_shares(kernel, num_sets)
    return hits._replace(num_scored=int(num_scored.sum()))


def _nodes(tree: BoxTree) -> Tree:
    return Tree(
        np.array(tree.starts, np.int64),
        tree.fanout,
        tree.counts.numpy(),
        np.log(tree.counts.numpy().astype(np.float32)),
        tree.first.numpy(),
    )


def _level(level: BoxLevel) -> list[NDArray[Any]]:
    parts = (level.lower, level.upper, level.scale, level.offset)
    return [*map(_whole, parts), np.ascontiguousarray(level.block.numpy())]


def _table(arrays: Sequence[NDArray[Any]]) -> list[int]:
    """Return what ``score_level`` knows a level by."""
    lower, upper, scale, offset, block = (array.ctypes.data for array in arrays)
    num_rows, num_blocks = arrays[0].shape[1], arrays[2].shape[1]
    return [lower, upper, num_rows, scale, offset, num_blocks, block, len(arrays[4])]


def _whole(tensor: Tensor) -> NDArray[Any]:
    """Return an array over the rows that a tensor is the beginning of: it is contiguous."""
    tensor = tensor.view(_VIEWS.get(tensor.dtype, tensor.dtype))
    if tensor.is_contiguous():
        return tensor.numpy()
    row = tensor.stride(0) // tensor.stride(1)
    return tensor.as_strided((len(tensor), row, tensor.shape[2]), tensor.stride()).numpy()
