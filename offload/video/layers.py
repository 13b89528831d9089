"""Run a language model with attention of our own, on states before their rotation.

At position 0 a rotation is the identity. A text model that is called with all positions 0 hands the
attention function queries and keys as they were before it, whatever the model; positions are given
when they are attended, by whoever knows which tokens are there.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from offload.errors import ConfigError
from offload.video.adapter import VideoAdapter

_NAME = "offload_video"


class Attends(Protocol):
    """Attention of one pass through a model."""

    def attend(
        self, layer: int, query: Tensor, keys: Tensor, values: Tensor, scale: float
    ) -> Tensor:
        """Attend in one layer.

        Parameters
        ----------
        layer : int
        query : Tensor, shape (num_heads, num_tokens, key_dim)
            Not rotated, as ``keys``.
        keys, values : Tensor, shape (num_kv_heads, num_tokens, dim)
            Of the tokens of this pass.
        scale : float

        Returns
        -------
        Tensor, shape (num_heads, num_tokens, value_dim)
        """
        ...


_current: ContextVar[Attends] = ContextVar("offload_video_attention")


def run(
    adapter: VideoAdapter, embeds: Tensor, attention: Attends, added: Tensor | None = None
) -> Tensor:
    """Run embeddings through the layers of a text model; return the last hidden states.

    Thread-safe as long as no two threads run the same model at a time.

    Parameters
    ----------
    adapter : VideoAdapter
    embeds : Tensor, shape (num_tokens, hidden_size)
    attention : Attends
    added : Tensor, optional, shape (num_levels, num_tokens, hidden_size)
        What is added to the states behind each of the first layers.

    Returns
    -------
    Tensor, shape (num_tokens, hidden_size)
    """
    more = {} if added is None else adapter.added_inputs(added)
    model = adapter.text_model
    zeros = torch.zeros(adapter.num_axes, 1, len(embeds), dtype=torch.long, device=embeds.device)
    positions = zeros[0] if adapter.num_axes == 1 else zeros
    token = _current.set(attention)
    try:
        with torch.no_grad(), _attention_of(model):
            found = model(
                inputs_embeds=embeds[None], position_ids=positions, use_cache=False, **more
            )
    finally:
        _current.reset(token)
    states: Tensor = found.last_hidden_state[0]
    return states


def check_model(adapter: VideoAdapter) -> None:
    """Raise ConfigError if states cannot be had before their rotation."""
    scaling = float(getattr(adapter.text_model.rotary_emb, "attention_scaling", 1.0))
    if scaling != 1.0:
        raise ConfigError(
            f"{adapter.name}: its rotary embedding scales states by {scaling:g}; only those that "
            "leave them as they are at position 0 can be streamed"
        )
    kinds = set(getattr(adapter.config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        raise ConfigError(f"{adapter.name}: layers of kinds {sorted(kinds)} cannot be streamed")


@contextmanager
def _attention_of(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.config._attn_implementation = _NAME
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _current.get().attend(module.layer_idx, query[0], key[0], value[0], scale)
    return out.transpose(0, 1)[None].contiguous(), None


AttentionInterface.register(_NAME, _attend)
