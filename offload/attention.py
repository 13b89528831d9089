"""Intercept attention: calls on an ``OffloadedCache`` go to its runtime, all others pass through.

transformers looks attention functions up with ``AttentionInterface.get_interface`` at every call.
What it returns is wrapped here, once per function, whatever its name (``sdpa``, ``eager``,
``flash_attention_2``, ...), so that passing the cache is all a user has to do. A plain cache, no
cache, or training never reach our code beyond one attribute look-up.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

from offload import weights
from offload.errors import ConfigError
from offload.exact import AttentionCall
from offload.handle import Handle, find_handle

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

_UNSUPPORTED = ("position_bias", "head_mask")
_lock = threading.Lock()


def install() -> None:
    """Make every attention function recognise our handles. Idempotent and thread-safe."""
    with _lock:
        lookup = AttentionInterface.get_interface
        if hasattr(lookup, "_offload_original"):
            return

        @functools.wraps(lookup)
        def get_interface(self: Any, name: str, default: AttentionFunction) -> AttentionFunction:
            return dispatcher(lookup(self, name, default))

        get_interface._offload_original = lookup  # type: ignore[attr-defined]
        AttentionInterface.get_interface = get_interface  # type: ignore[method-assign, assignment]


@functools.cache
def dispatcher(original: AttentionFunction) -> AttentionFunction:
    """Wrap one attention function."""

    @functools.wraps(original)
    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        handle = find_handle(module, query, key, value)
        if handle is None:
            return original(module, query, key, value, attention_mask, **kwargs)
        if _is_padding(attention_mask):
            attention_mask = attention_mask[:, 0, 0]
        if weights.are_wanted(module, kwargs):
            return weights.attend(handle, original, module, query, attention_mask, kwargs)
        if handle.core.latent_dims is not None:
            handle = handle.expanded(key, value)
        return _attend(handle, module, query, attention_mask, kwargs), None

    return attention


def _is_padding(mask: Tensor | None) -> TypeGuard[Tensor]:
    """Whether a mask says nothing about single queries, as those of ``offload.masks`` do."""
    return (
        mask is not None
        and mask.ndim == 4
        and mask.dtype == torch.bool
        and mask.shape[1:3] == (1, 1)
    )


@torch.compiler.disable
def _attend(
    handle: Handle,
    module: Any,
    query: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Tensor:
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ConfigError(f"OffloadedCache does not support {name}; use DynamicCache")
    if kwargs.get("dropout"):
        raise ConfigError(
            f"attention dropout {kwargs['dropout']} is on: OffloadedCache is for inference; "
            "call model.eval()"
        )
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if not is_causal and query.shape[2] > 1 and (mask is None or mask.ndim == 2):
        raise ConfigError("OffloadedCache does not support bidirectional attention")
    scale = kwargs.get("scaling")
    call = AttentionCall(
        query=query,
        scale=query.shape[-1] ** -0.5 if scale is None else float(scale),
        mask=mask,
        softcap=kwargs.get("softcap"),
        window=kwargs.get("sliding_window"),
        sinks=kwargs.get("s_aux"),
        expand=module.expand_kv if handle.core.latent_dims is not None else None,
    )
    return handle.attend(call)
