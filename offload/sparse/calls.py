"""Which calls of attention can be answered sparsely."""

import torch
from torch import Tensor

from offload.exact import AttentionCall


def is_plain(call: AttentionCall) -> bool:
    """Whether a query sees every earlier key, with the softmax of its scaled inner product."""
    return call.expand is None and call.softcap is None and call.window is None


def hidden_tokens(mask: Tensor | None) -> int | None:
    """Return how many first tokens contain all that a mask hides; None if it is no such mask."""
    if mask is None:
        return 0
    if mask.ndim != 2 or mask.dtype != torch.bool:
        return None
    hidden = (~mask).any(0).nonzero()
    return int(hidden[-1]) + 1 if len(hidden) else 0
