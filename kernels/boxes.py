"""Boxes around keys, in the levels of a tree, and what no logit of a box exceeds or falls below.

A box is the smallest and the largest key of a node, channel by channel. With ``q+ = max(q, 0)`` and
``q- = min(q, 0)`` every logit of the node lies between ``q+ . lower + q- . upper`` and
``q+ . upper + q- . lower``. So the box of a parent, which contains those of its children, has
bounds that are never tighter than theirs.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Scope = Literal["kv_head", "layer"]


class BoxLevel(NamedTuple):
    """The boxes of one level.

    Attributes
    ----------
    lower, upper : Tensor, shape (num_heads, num_nodes, key_dim)
        Floats; or uint8 codes of ``offset + scale * code``.
    scale, offset : Tensor, float32 [num_heads, num_blocks, key_dim]
        Of the codes in each block of nodes; no blocks where there are no codes.
    block : Tensor, int32 [num_nodes]
        The block of each node; empty where there are no codes.
    """

    lower: Tensor
    upper: Tensor
    scale: Tensor
    offset: Tensor
    block: Tensor

    @property
    def is_coded(self) -> bool:
        """Whether the boxes are in 8 bits."""
        return self.lower.dtype == torch.uint8

    @property
    def num_nodes(self) -> int:
        """Boxes per head."""
        return self.lower.shape[1]

    def decoded(self) -> tuple[Tensor, Tensor]:
        """Return lower and upper as float32."""
        if not self.is_coded:
            return self.lower.float(), self.upper.float()
        block = self.block.long()
        scale, offset = self.scale[:, block], self.offset[:, block]
        return offset + scale * self.lower, offset + scale * self.upper

    def some(self, nodes: Tensor) -> "BoxLevel":
        """Return copies of some boxes, decoded.

        Parameters
        ----------
        nodes : Tensor, int64 [num_heads, num_some]
        """
        places = nodes.unsqueeze(-1)
        lower, upper = (rows.take_along_dim(places, 1) for rows in (self.lower, self.upper))
        if self.is_coded:
            blocks = self.block.long()[nodes].unsqueeze(-1)
            scale, offset = (rows.take_along_dim(blocks, 1) for rows in (self.scale, self.offset))
            lower, upper = offset + scale * lower, offset + scale * upper
        none = self.scale[:, :0]
        return BoxLevel(lower, upper, none, none, self.block[:0])


class BoxTree(NamedTuple):
    """Levels of boxes; nodes are numbered through all of them, the leaves first.

    Attributes
    ----------
    levels : tuple of BoxLevel
        The leaves, their parents, and so on.
    fanout : int
        Children of a node, but of the last one of a level, which may have fewer.
    counts : Tensor, int16 [num_nodes]
        Tokens of each node.
    first : Tensor, int64 [num_nodes]
        Its first token.
    """

    levels: tuple[BoxLevel, ...]
    fanout: int
    counts: Tensor
    first: Tensor

    @property
    def starts(self) -> list[int]:
        """Number of the first node of each level, and of all nodes."""
        starts = [0]
        for level in self.levels:
            starts.append(starts[-1] + level.num_nodes)
        return starts

    @property
    def num_heads(self) -> int:
        """KV heads."""
        return self.levels[0].lower.shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens per head."""
        return int(self.first[self.levels[0].num_nodes - 1]) + int(
            self.counts[self.levels[0].num_nodes - 1]
        )


@dataclass(frozen=True, slots=True)
class BoxRules:
    """How a tree of boxes is searched.

    Attributes
    ----------
    over : float
        Nodes are looked into whose tokens add up to so many times the budget.
    flat_from : float
        Share of the tokens; from such a budget on all leaves are scored.
    scope : {"kv_head", "layer"}
        Whether each KV head has tokens of its own, or all heads of the layer the same ones, chosen
        as for one group of all their queries.
    patience : int or None
        Steps after which a split node, whose children were all rejected in each of them, is whole
        again. None: every search begins at the top.
    lost_mass : float or None
        Share of the softmax that may be lost. Nodes are only taken until the bounds prove that what
        is left is less; None: until the budget.
    lean : float
        From 0.5 to 1: where between its bounds a node is ranked, 0.5 in the middle, 1 at the upper
        one.
    """

    over: float = 3.0
    flat_from: float = 0.2
    scope: Scope = "kv_head"
    patience: int | None = None
    lost_mass: float | None = None
    lean: float = 1.0

    def is_flat(self, budget: int, num_tokens: int) -> bool:
        """Whether all leaves are scored for such a budget."""
        return budget >= min(self.flat_from, 1 / self.over) * num_tokens


class BoxCut(NamedTuple):
    """Where the last search of the same queries left a tree, to begin there.

    Attributes
    ----------
    split : Tensor, uint8 [num_sets, num_nodes]
        Zero: not split. Else one more than the searches in a row in which its children were all
        rejected. The parents of what is split are split.
    slack : Tensor, float32 [num_sets, num_levels]
        How much lower than a node's own its best child's score is, on average.
    """

    split: Tensor
    slack: Tensor


class BoxHits(NamedTuple):
    """What a search found; there is a set of tokens for each KV head, or one for all.

    Attributes
    ----------
    ids : Tensor, int64 [num_sets, num_hits]
        Tokens of the best nodes first; -1 where a set has fewer.
    cut : BoxCut
    num_scored : int
        Boxes that were looked at, of all heads.
    certified : Tensor, bool [num_sets]
        Whether the bounds prove that no query loses more than ``lost_mass``.
    """

    ids: Tensor
    cut: BoxCut
    num_scored: int
    certified: Tensor


def bounds(level: BoxLevel, query: Tensor, nodes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return what no logit of a node exceeds, and what none falls below.

    Parameters
    ----------
    level : BoxLevel
    query : Tensor, shape (num_heads, num_queries, key_dim), float32
    nodes : Tensor, int64 [num_heads, num_some], optional
        Which nodes; default: all of the level.

    Returns
    -------
    upper, lower : Tensor, shape (num_heads, num_queries, num_some), float32
    """
    if nodes is not None:
        level = level.some(nodes)
    lower, upper = level.decoded()
    positive, negative = query.clamp_min(0), query.clamp_max(0)
    above = torch.baddbmm(torch.bmm(positive, upper.mT), negative, lower.mT)
    below = torch.baddbmm(torch.bmm(positive, lower.mT), negative, upper.mT)
    return above, below
