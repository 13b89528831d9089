"""What several queries of a group found, as one set."""

import torch
from torch import Tensor

from offload.index.base import NO_TOKEN, Combine


def best_of_group(ids: Tensor, scores: Tensor, budget: int, group: Combine = "max") -> Tensor:
    """Return the tokens with the largest share of the softmaxes over what was found.

    Parameters
    ----------
    ids : Tensor, int64 [num_heads, num_queries, num_found]
        Distinct for each query; ``NO_TOKEN`` where it found fewer.
    scores : Tensor, float32 [num_heads, num_queries, num_found]
        Logits; ``-inf`` where there is no token.
    budget : int
    group : {"max", "sum"}
        The largest share that any query gives a token counts, or the sum over queries.

    Returns
    -------
    Tensor, int64 [num_heads, at most budget]
        Best first; ``NO_TOKEN`` where a head has fewer.
    """
    lse = scores.logsumexp(-1, keepdim=True).nan_to_num(neginf=0.0)
    ids, order = ids.flatten(1).sort(1)
    shares = (scores - lse).flatten(1).gather(1, order)
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    place = is_first.cumsum(1) - 1
    tokens = torch.full_like(ids, NO_TOKEN).scatter_(1, place, ids)
    combined = torch.full_like(shares, -torch.inf).scatter_reduce_(1, place, shares, "amax")
    if group == "sum":
        # Relative to the largest, as a sum of shares themselves is zero far behind the best.
        relative = (shares - combined.gather(1, place)).nan_to_num(nan=0.0).exp()
        combined += torch.zeros_like(shares).scatter_add_(1, place, relative).log()
    best = combined.topk(min(budget, combined.shape[1]), 1)
    return torch.where(torch.isinf(best.values), NO_TOKEN, tokens.gather(1, best.indices))
