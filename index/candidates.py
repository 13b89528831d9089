"""What several queries of a group found, as one set."""

import torch
from torch import Tensor

from offload.index.base import NO_TOKEN


def best_of_group(ids: Tensor, scores: Tensor, num_tokens: int, budget: int) -> Tensor:
    """Return the tokens with the largest share of any query's softmax over what it found.

    Parameters
    ----------
    ids : Tensor, int64 [num_heads, num_queries, num_found]
        Distinct for each query; negative where it found fewer.
    scores : Tensor, float32 [num_heads, num_queries, num_found]
        Logits; ``-inf`` where there is no token.
    num_tokens : int
        Larger than any id.
    budget : int

    Returns
    -------
    Tensor, int64 [num_heads, at most budget]
        ``NO_TOKEN`` where a head has fewer.
    """
    num_heads, _, num_found = scores.shape
    if num_found == 0:
        return ids.new_empty(num_heads, 0)
    lse = scores.logsumexp(-1, keepdim=True).nan_to_num(neginf=0.0)
    best = scores.new_full((num_heads, num_tokens + 1), -torch.inf)
    places = torch.where(ids >= 0, ids, num_tokens).flatten(1)
    best.scatter_reduce_(1, places, (scores - lse).flatten(1), "amax")
    best[:, num_tokens] = -torch.inf
    wanted = min(budget, num_tokens, scores.shape[1] * num_found)
    shares, tokens = best.topk(wanted, 1)
    return torch.where(torch.isinf(shares), NO_TOKEN, tokens)
