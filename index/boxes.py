"""The leaves of a tree of boxes: built from keys, kept exactly or in 8 bits, and their parents."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from offload.index.chunks import Chunking, per_chunk
from offload.kernels.boxes import BoxLevel, BoxTree

BLOCK_LEAVES = 128
"""Leaves whose codes share a scale: with 128, scales add 3 % to the codes."""

_STEPS = 253
"""Of 255, so that a code can still be moved outward by one where decoding rounds inward."""

_LEAST_STEP = 2.0**-22
"""Relative to the largest number of a block: two steps of float32, so that a step is one."""


@dataclass(frozen=True, slots=True)
class Leaves:
    """Smallest and largest key of each leaf, for all heads.

    Attributes
    ----------
    lower, upper : Tensor, shape (num_heads, num_leaves, key_dim)
        In the dtype of the keys, or uint8 codes of ``offset + scale * code`` that are rounded
        outward: they bound the keys as well.
    scale, offset : Tensor, float32 [num_heads, num_blocks, key_dim]
        Of ``BLOCK_LEAVES`` leaves of a run each; no blocks where nothing is coded.
    leaf_tokens : int
    cuts : Chunking
        Into blocks where leaves are coded, else into leaves.
    """

    lower: Tensor
    upper: Tensor
    scale: Tensor
    offset: Tensor
    leaf_tokens: int
    cuts: Chunking

    @classmethod
    def build(cls, keys: Tensor, leaf_tokens: int, *, coded: bool) -> Self:
        """Bound a run of keys, ``[num_heads, num_tokens, key_dim]``."""
        lower = per_chunk(keys, leaf_tokens, lambda leaves: leaves.amin(2))
        upper = per_chunk(keys, leaf_tokens, lambda leaves: leaves.amax(2))
        cut_tokens = leaf_tokens * BLOCK_LEAVES if coded else leaf_tokens
        cuts = Chunking(cut_tokens, (keys.shape[1],))
        if coded:
            return cls(*encode(lower, upper), leaf_tokens, cuts)
        none = keys.new_empty(len(keys), 0, keys.shape[2], dtype=torch.float32)
        return cls(lower, upper, none, none, leaf_tokens, cuts)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Return the leaves of consecutive runs, which were built alike."""
        names = ("lower", "upper", "scale", "offset")
        lower, upper, scale, offset = (
            torch.cat([getattr(part, name) for part in parts], 1) for name in names
        )
        cuts = Chunking.join([part.cuts for part in parts])
        return cls(lower, upper, scale, offset, parts[0].leaf_tokens, cuts)

    @classmethod
    def restore(
        cls,
        lower: Tensor,
        upper: Tensor,
        scale: Tensor,
        offset: Tensor,
        leaf_tokens: int,
        runs: Sequence[int],
    ) -> Self:
        """Return leaves of these tensors; ``runs`` as ``cuts`` had them."""
        per_cut = BLOCK_LEAVES if scale.shape[1] else 1
        return cls(
            lower, upper, scale, offset, leaf_tokens, Chunking(leaf_tokens * per_cut, tuple(runs))
        )

    def prefix(self, num_tokens: int) -> Self:
        """Return the leaves of the first tokens, as views."""
        cuts = self.cuts.prefix(num_tokens)
        leaves = Chunking(self.leaf_tokens, cuts.runs).num_chunks
        blocks = cuts.num_chunks
        rows = (self.lower[:, :leaves], self.upper[:, :leaves])
        scales = (self.scale[:, :blocks], self.offset[:, :blocks])
        return type(self)(*rows, *scales, self.leaf_tokens, cuts)

    def tree(self, fanout: int, num_levels: int) -> BoxTree:
        """Return the leaves with their parents, each of ``fanout`` neighbours, and so on."""
        device = self.lower.device
        counts = Chunking(self.leaf_tokens, self.cuts.runs).lengths(device)
        leaves = BoxLevel(self.lower, self.upper, self.scale, self.offset, self._blocks(device))
        levels, sizes = [leaves], [counts]
        for _ in range(1, num_levels):
            levels.append(_parents(levels[-1], fanout))
            sizes.append(pad(sizes[-1], (0, -len(sizes[-1]) % fanout)).view(-1, fanout).sum(1))
        first = torch.cat([size.cumsum(0) - size for size in sizes])
        return BoxTree(tuple(levels), fanout, torch.cat(sizes).to(torch.int16), first)

    def _blocks(self, device: torch.device) -> Tensor:
        """Return the block of each leaf, int32."""
        if not self.scale.shape[1]:
            return torch.empty(0, dtype=torch.int32, device=device)
        sizes = -(-self.cuts.lengths(device) // self.leaf_tokens)
        numbers = torch.arange(len(sizes), device=device, dtype=torch.int32)
        return numbers.repeat_interleave(sizes)


def encode(
    lower: Tensor, upper: Tensor, block_nodes: int = BLOCK_LEAVES
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Round boxes outward to 8 bits, with a scale per head, channel and block of boxes.

    Parameters
    ----------
    lower, upper : Tensor, shape (num_heads, num_nodes, dim)
    block_nodes : int
        Boxes of a block.

    Returns
    -------
    lower, upper : Tensor, uint8 [num_heads, num_nodes, dim]
        Codes of what is not above ``lower`` and not below ``upper``.
    scale, offset : Tensor, float32 [num_heads, num_blocks, dim]
    """
    lower, upper = lower.float(), upper.float()
    least = per_chunk(lower, block_nodes, lambda boxes: boxes.amin(2))
    most = per_chunk(upper, block_nodes, lambda boxes: boxes.amax(2))
    largest = torch.maximum(least.abs(), most.abs())
    scale = torch.maximum(most / _STEPS - least / _STEPS, largest * _LEAST_STEP)
    offset = least - scale
    first, step = (
        rows.repeat_interleave(block_nodes, 1)[:, : lower.shape[1]] for rows in (offset, scale)
    )
    unit = torch.where(step > 0, step, 1.0)
    below = ((lower - first) / unit).floor_().clamp_(0, 255)
    above = ((upper - first) / unit).ceil_().clamp_(0, 255)
    below -= (first + step * below > lower).float()
    above += (first + step * above < upper).float()
    low, high = (rows.clamp_(0, 255).to(torch.uint8) for rows in (below, above))
    return low, high, scale, offset


def _parents(level: BoxLevel, fanout: int) -> BoxLevel:
    """Return the boxes around ``fanout`` neighbours each.

    Codes of one block are in order, so theirs are the smallest and the largest of their children.
    """
    lower = per_chunk(level.lower, fanout, lambda boxes: boxes.amin(2))
    upper = per_chunk(level.upper, fanout, lambda boxes: boxes.amax(2))
    if not level.is_coded:
        return BoxLevel(lower, upper, level.scale, level.offset, level.block)
    first = level.block[::fanout].contiguous()
    end = level.num_nodes - 1
    ends = torch.arange(1, len(first) + 1, device=first.device) * fanout - 1
    torn = (first != level.block[ends.clamp_max(end)]).nonzero().flatten()
    if not len(torn):
        return BoxLevel(lower, upper, level.scale, level.offset, first)
    # Where a run ended, children may be of two blocks. Their parent gets a scale of its own.
    children = (torn.unsqueeze(1) * fanout + torch.arange(fanout, device=torn.device)).flatten()
    low, high = level.some(children.clamp_max(end).expand(len(lower), -1)).decoded()
    low, high = low.unflatten(1, (-1, fanout)).amin(2), high.unflatten(1, (-1, fanout)).amax(2)
    lower[:, torn], upper[:, torn], scale, offset = encode(low, high, 1)
    block = first.clone()
    numbers = torch.arange(len(torn), device=torn.device, dtype=block.dtype)
    block[torn] = level.scale.shape[1] + numbers
    scale, offset = torch.cat([level.scale, scale], 1), torch.cat([level.offset, offset], 1)
    return BoxLevel(lower, upper, scale, offset, block)
