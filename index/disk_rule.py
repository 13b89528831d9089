"""Which chunks on disk are worth reading: LeoAM's rule, which compares abstracts with memory. Pure.

What lies in memory is ranked first. A chunk on disk is wanted if its score, which is known from its
abstract, reaches that of the worst chunk that would be kept without the disk; then both are ranked
together and cut. Whatever a ranking of all chunks would choose passes: the budget is full of chunks
that are no worse than that, so its cut is no lower.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from offload.index.base import NO_TOKEN
from offload.index.chunks import best_tokens


class DiskChoice(NamedTuple):
    """What is read.

    Attributes
    ----------
    ids : Tensor, int64 [num_heads, num_hits]
        Tokens of the best chunks first; ``NO_TOKEN`` where a head has fewer.
    wanted : Tensor, bool [num_heads, num_chunks]
        Chunks on disk that are compared with those in memory.
    least : Tensor, shape (num_heads,)
        The score that they reach; ``-inf`` where memory alone does not fill the budget.
    """

    ids: Tensor
    wanted: Tensor
    least: Tensor


def choose_with_disk(
    scores: Tensor, lengths: Tensor, on_disk: Tensor, budget: int, over: float = math.inf
) -> DiskChoice:
    """Choose tokens of chunks in memory and on disk.

    Parameters
    ----------
    scores : Tensor, shape (num_heads, num_chunks)
    lengths : Tensor, int64 [num_chunks]
        Tokens of each chunk.
    on_disk : Tensor, bool [num_heads, num_chunks]
    budget : int
        Tokens per head, at most.
    over : float
        No more chunks on disk are wanted than have so many times the budget, the best ones.
    """
    inside = ~on_disk
    least = _last_score(scores.masked_fill(on_disk, -math.inf), inside, lengths, budget)
    wanted = on_disk & (scores >= least)
    if over < math.inf:
        outside = scores.masked_fill(~wanted, -math.inf)
        wanted &= scores >= _last_score(outside, wanted, lengths, math.ceil(over * budget))
    known = inside | wanted
    ids = best_tokens(scores.masked_fill(~known, -math.inf), lengths, budget)
    chunk_of = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
    ids = torch.where(known.gather(1, chunk_of[ids]), ids, NO_TOKEN)
    return DiskChoice(ids, wanted, least.squeeze(1))


def _last_score(scores: Tensor, counted: Tensor, lengths: Tensor, budget: int) -> Tensor:
    """Return the score of the last chunk that fills the budget; ``-inf`` if nothing fills it."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    filled = torch.where(counted, lengths, 0).gather(1, order).cumsum(1)
    last = (filled < budget).sum(1, keepdim=True)
    ranked = torch.nn.functional.pad(scores.gather(1, order), (0, 1), value=-math.inf)
    return ranked.gather(1, last)
