"""Keep masks small: a causal mask over an ``OffloadedCache`` is never written out.

transformers asks the cache for the length that a mask must cover and passes the answer to the mask
function unchanged. Our answer is an ``int`` that remembers its cache, so the mask function knows
that attention will rebuild causality from positions and needs the padding only.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol

from torch import Tensor
from torch.nn.functional import pad
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function

from offload.errors import ConfigError

_lock = threading.Lock()


class Binder(Protocol):
    """What a mask tells a cache."""

    def bind(self, config: Any) -> None:
        """Learn the model's config, before the first layer runs."""
        ...

    @property
    def offloads(self) -> bool:
        """Whether any layer is offloaded; true while the model is unknown."""
        ...


class MaskLength(int):
    """A mask's length in tokens that remembers which cache it came from."""

    cache: Binder

    def __new__(cls, length: int, cache: Binder) -> "MaskLength":
        """Return ``length`` with ``cache`` attached."""
        self = super().__new__(cls, length)
        self.cache = cache
        return self


def install() -> None:
    """Make every registered mask function recognise ``MaskLength``. Idempotent, thread-safe."""
    with _lock:
        registry: dict[str, Any] = type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping
        for name, original in registry.items():
            if not hasattr(original, "_offload_original"):
                registry[name] = _dispatcher(original)


def _dispatcher(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def mask(*args: Any, **kwargs: Any) -> Any:
        length = kwargs.get("kv_length")
        if not isinstance(length, MaskLength):
            return original(*args, **kwargs)
        length.cache.bind(kwargs.get("config"))
        if "allow_is_bidirectional_skip" in kwargs:
            raise ConfigError(
                "the model attends bidirectionally, which OffloadedCache does not; use DynamicCache"
            )
        # Only the runtime rebuilds causality: layers that stay transformers' own need their mask.
        if length.cache.offloads and _is_plain_causal(kwargs):
            return _padding(kwargs.get("attention_mask"), length)
        return original(*args, **{**kwargs, "kv_length": int(length)})

    mask._offload_original = original  # type: ignore[attr-defined]
    return mask


def _is_plain_causal(kwargs: dict[str, Any]) -> bool:
    """Whether the pattern is causality and nothing else; overlays need the mask written out."""
    return (
        kwargs.get("mask_function") is causal_mask_function
        and kwargs.get("allow_is_causal_skip", True)
        and not kwargs.get("use_vmap", False)
    )


def _padding(attention_mask: Tensor | None, length: int) -> Tensor | None:
    """Return the padding ``[batch, 1, 1, length]`` as bool, or None if nothing is padded.

    Four dimensions, because some models cut the rows of their last queries out of a mask.

    A mask that is too short hides the newest tokens, as it does in transformers' own masks.
    """
    if attention_mask is None:
        return None
    padding = attention_mask[:, -length:].bool()
    padding = pad(padding, (0, length - padding.shape[1]))
    return None if bool(padding.all()) else padding[:, None, None, :]
