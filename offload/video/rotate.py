"""Rotate states to positions, and attend."""

import torch
from torch import Tensor

from offload.kernels.dispatch import partial_attention
from offload.types import Partial
from offload.video.adapter import VideoAdapter


def rotated(adapter: VideoAdapter, states: Tensor, positions: Tensor) -> Tensor:
    """Give states their positions.

    Parameters
    ----------
    adapter : VideoAdapter
    states : Tensor, shape (num_heads, num_tokens, key_dim)
    positions : Tensor, int64 [num_axes, num_tokens]
    """
    if not states.shape[1]:
        return states
    cos, sin = adapter.rotation(states, positions.to(states.device))
    width = cos.shape[-1]
    turned, rest = states[..., :width], states[..., width:]
    half = width // 2
    across = torch.cat([-turned[..., half:], turned[..., :half]], -1)
    return torch.cat([turned * cos + across * sin, rest], -1)


def attend(
    query: Tensor, keys: Tensor, values: Tensor, scale: float, hidden: Tensor | None = None
) -> Partial:
    """Attend to rotated keys.

    Parameters
    ----------
    query : Tensor, shape (num_heads, num_queries, key_dim)
    keys, values : Tensor, shape (num_kv_heads, num_keys, dim)
    scale : float
    hidden : Tensor, bool [num_queries, num_keys], optional
        What is not seen.
    """
    bias = None
    if hidden is not None:
        bias = torch.zeros(hidden.shape, dtype=torch.float32, device=query.device)
        bias = bias.masked_fill_(hidden, -torch.inf)[None, None]
    return partial_attention(
        query[None], keys[None, None], values[None, None], scale=scale, bias=bias
    )
