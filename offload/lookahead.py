"""Look one layer ahead: read from the disk what the next layer will need while this one computes.

InfiniGen (OSDI'24), section 4: a residual stream changes little from layer to layer, so the input
of one layer, put through the norm and the query projection of the next, is close to the query that
the next layer will ask. InfiniGen rehearses attention with a part of the columns of all keys; here
the estimate is searched for in the index that answers the true query as well.
"""

import inspect
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from offload.cache import OffloadedCache
from offload.errors import ConfigError
from offload.runtime import Runtime
from offload.sparse.retrieval import Layer
from offload.support import latent_dims

Rotation = tuple[Tensor, Tensor]
"""Cosine and sine of the positions of a call, as rotary models hand them to their layers."""


def look_ahead(model: PreTrainedModel, cache: OffloadedCache) -> "LookAhead":
    """Prefetch for each layer what it will probably choose, from the input of the layer before.

    Acts on calls of one token with this cache, not with its forks, as long as a sparse policy has
    rows on a disk and host memory to keep them in. Costs a query projection and a search per layer
    then, and nothing otherwise. Results do not change, unless ``max_wait_us`` limits the wait:
    then more arrives in time. ``cache.stats().rows.foreseen_share`` says how good the guess is.

    Parameters
    ----------
    model : PreTrainedModel
        Llama, Mistral, Qwen2, Qwen3 and others whose layers are built alike.
    cache : OffloadedCache
        Is not kept alive.

    Returns
    -------
    LookAhead
        Ends with ``remove``, or as a context manager.

    Raises
    ------
    ConfigError
        The query of a layer cannot be estimated; says what the model lacks.
    """
    return LookAhead(model, cache)


class LookAhead:
    """The hooks on one model for one cache; see ``look_ahead``.

    Attributes
    ----------
    estimates : list of QueryEstimate
        One for each decoder layer.
    """

    def __init__(self, model: PreTrainedModel, cache: OffloadedCache) -> None:
        self.estimates = estimates_for(model)
        self._cache = weakref.ref(cache)
        self._hooks = [
            own.layer.register_forward_pre_hook(partial(self._begin, following), with_kwargs=True)
            for own, following in pairwise(self.estimates)
        ]

    def remove(self) -> None:
        """Take the hooks off the model. Idempotent."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.remove()

    @torch.compiler.disable
    @torch.no_grad()
    def _begin(
        self, following: "QueryEstimate", layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        cache = self._cache()
        is_used = kwargs.get("past_key_values") is cache
        if cache is None or not is_used:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        runtime = cache._core.runtime
        if hidden.shape[1] == 1 and runtime is not None:
            _anticipate(runtime, following, hidden, kwargs["position_embeddings"])


@dataclass(frozen=True, slots=True)
class QueryEstimate:
    """Estimates the query of one decoder layer.

    Attributes
    ----------
    layer : Module
        With ``input_layernorm`` and ``self_attn``.
    rotate : callable
        ``apply_rotary_pos_emb`` of the model's own file: which dimensions belong together differs.
    """

    layer: Any
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], Rotation]

    @property
    def index(self) -> int:
        """Of the layer in the cache."""
        index: int = self.layer.self_attn.layer_idx
        return index

    def query(self, hidden: Tensor, rotation: Rotation) -> Tensor:
        """Return what the layer would ask.

        Parameters
        ----------
        hidden : Tensor, shape (batch, 1, hidden_size)
            Before the norm.
        rotation : Rotation

        Returns
        -------
        Tensor, shape (batch, num_heads, head_dim)
            Scaled: ``query @ key`` is the logit.
        """
        attention = self.layer.self_attn
        asked = attention.q_proj(self.layer.input_layernorm(hidden))
        asked = asked.unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, "q_norm"):
            asked = attention.q_norm(asked)
        asked = asked.transpose(1, 2)
        if getattr(attention, "use_rope", True):
            asked, _ = self.rotate(asked, asked, *rotation)
        query: Tensor = asked[:, :, 0] * attention.scaling
        return query


def _anticipate(
    runtime: Runtime, following: QueryEstimate, hidden: Tensor, rotation: Rotation
) -> None:
    retrieval, sequence = runtime.engine.retrieval, runtime.layers.get(following.index)
    if retrieval is None or sequence is None:
        return
    with runtime.engine.lock:
        layer = Layer(
            owner=id(runtime),
            index=following.index,
            number=list(runtime.layers).index(following.index),
            version=sequence.tables.version,
            rows=sequence.tables.rows,
            num_past_chunks=sequence.tables.num_positions,
            num_context=sequence.num_tokens + hidden.shape[1],
        )
        if retrieval.can_anticipate(layer):
            retrieval.anticipate(layer, following.query(hidden, rotation))


def estimates_for(model: PreTrainedModel) -> list[QueryEstimate]:
    """Return what estimates the queries of each decoder layer of a model.

    Raises
    ------
    ConfigError
        There is none for some layer.
    """
    name = f"look_ahead cannot estimate the queries of {type(model).__name__}"
    decoder: Any = model.get_decoder()
    layers = list(getattr(decoder, "layers", []))
    if not layers:
        raise ConfigError(f"{name}: its {type(decoder).__name__} has no 'layers'")
    config = model.config.get_text_config(decoder=True)
    if latent_dims(config) is not None:
        raise ConfigError(f"{name}: it caches latents, which are not read sparsely")
    for index, kept in enumerate(DynamicCache(config=config).layers):
        if type(kept).__name__ != "DynamicLayer":
            raise ConfigError(f"{name}: layer {index} has a {type(kept).__name__}, not all keys")
    estimates = []
    for index, layer in enumerate(layers):
        obstacle = _obstacle(layer)
        if obstacle is not None:
            raise ConfigError(f"{name}: layer {index}, {type(layer).__name__}, {obstacle}")
        file = sys.modules[type(layer.self_attn).__module__]
        estimates.append(QueryEstimate(layer, file.apply_rotary_pos_emb))
    return estimates


def _obstacle(layer: Any) -> str | None:
    """Say why the query of a layer cannot be estimated; None if it can."""
    if not hasattr(layer, "input_layernorm"):
        return "has no 'input_layernorm'"
    attention = getattr(layer, "self_attn", None)
    for name in ("q_proj", "head_dim", "scaling", "layer_idx"):
        if not hasattr(attention, name):
            return f"has no 'self_attn.{name}'"
    if "position_embeddings" not in inspect.signature(layer.forward).parameters:
        return "takes no 'position_embeddings'"
    if not hasattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb"):
        return "has no 'apply_rotary_pos_emb' in the file of its attention"
    if hasattr(attention, "rotary_ndims"):
        return "rotates some dimensions of a query itself"
    return None
