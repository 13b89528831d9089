"""What one search of a tree of boxes leaves for the next: which nodes are split."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from offload.kernels.boxes import BoxCut


@dataclass(frozen=True, slots=True)
class Frontier:
    """The nodes that searches begin with: those that are not split, but whose parents all are.

    It holds for an index that has grown too: leaves are added at the end, so a node keeps its
    number within its level; the last one of a level may get more children.

    Attributes
    ----------
    split : tuple of Tensor, uint8 [num_sets, num_nodes]
        Of each level, the leaves first; see ``BoxCut``.
    slack : Tensor, float32 [num_sets, num_levels]
    """

    split: tuple[Tensor, ...]
    slack: Tensor

    @classmethod
    def of(cls, cut: BoxCut, sizes: Sequence[int]) -> Self:
        """Return what a search left in a tree with levels of these sizes."""
        return cls(cut.split.split(list(sizes), 1), cut.slack)

    def over(self, sizes: Sequence[int], num_sets: int) -> BoxCut | None:
        """Return where to begin in a tree with levels of these sizes; None if it is another one."""
        if len(sizes) != len(self.split) or len(self.slack) != num_sets:
            return None
        pairs = zip(self.split, sizes, strict=True)
        return BoxCut(
            torch.cat([pad(s[:, :n], (0, max(0, n - s.shape[1]))) for s, n in pairs], 1), self.slack
        )

    def num_split(self) -> int:
        """Return how many nodes are split, of all sets."""
        return sum(int((level > 0).sum()) for level in self.split)
