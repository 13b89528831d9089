"""Attention weights, for who asks for them: they need every key at once, so nothing is streamed."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from offload import _compat
from offload.handle import Handle


def are_wanted(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this call must return weights: under ``eager`` only, as in transformers."""
    implementation = getattr(getattr(module, "config", None), "_attn_implementation", None)
    asked = bool(kwargs.get("output_attentions")) or _compat.collects_attentions()
    return implementation == "eager" and asked


def attend(
    handle: Handle,
    original: Callable[..., tuple[Tensor, Tensor | None]],
    module: Any,
    query: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """Call the model's own attention function on all keys, brought to the device together.

    Takes memory for the whole layer and for ``[batch, num_heads, num_queries, num_tokens]``
    weights, outside any capacity.
    """
    keys, values = handle.core.read_layer(handle.layer)
    if handle.core.latent_dims is not None:
        keys, values = module.expand_kv(keys, values)
    if mask is None or mask.ndim == 2:
        mask = _written_out(mask, query, keys.shape[2], kwargs.get("sliding_window"))
    return original(module, query, keys, values, mask, **kwargs)


def _written_out(
    padding: Tensor | None, query: Tensor, num_tokens: int, window: int | None
) -> Tensor:
    """Return the causal mask ``[batch or 1, 1, num_queries, num_tokens]``, additive."""
    key = torch.arange(num_tokens, device=query.device)
    position = key[num_tokens - query.shape[2] :, None]
    visible = (key <= position) & (key > position - (window or math.inf))
    visible = visible[None, None]
    if padding is not None:
        visible = visible & padding[:, None, None, :]
    hidden = torch.zeros(visible.shape, dtype=query.dtype, device=query.device)
    return hidden.masked_fill_(~visible, torch.finfo(query.dtype).min)
