"""The cache layers that transformers sees."""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from offload import _compat
from offload.core import CacheCore
from offload.errors import ConfigError
from offload.handle import Handle, leave_latents, stand_ins
from offload.masks import Binder, MaskLength


class OffloadedLayer(CacheLayerMixin):
    """A full-attention layer whose keys and values live on the tiers.

    ``update`` returns stand-ins (see ``offload.handle``); attention on them goes to the runtime.

    Parameters
    ----------
    core : CacheCore
    index : int
        Index of the model layer.
    binder : Binder
        The cache, for the mask.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, core: CacheCore, index: int, binder: Binder) -> None:
        self._core = core
        self._index = index
        self._binder = binder

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether the layer has seen a token."""
        return self.get_seq_length() > 0

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """All keys, copied together from the tiers; needs the memory for it. None if empty."""
        return self._read(0)

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """All values, copied together from the tiers; needs the memory for it. None if empty."""
        return self._read(1)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the first ``update`` opens the layer."""

    @torch.compiler.disable
    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Store new tokens; return stand-ins for all of them.

        Parameters
        ----------
        key_states, value_states : Tensor, shape (batch, num_kv_heads, num_new_tokens, dim)
        """
        appended = self._core.append(self._index, key_states, value_states)
        handle = Handle(self._core, self._index, appended)
        if self._core.latent_dims == (key_states.shape[-1], value_states.shape[-1]):
            leave_latents(handle, key_states)
            return key_states, value_states
        return stand_ins(handle, key_states, value_states, self.get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset of the keys that the next mask covers."""
        return MaskLength(self.get_seq_length() + query_length, self._binder), 0

    def get_seq_length(self) -> int:
        """Return the tokens per row."""
        return self._core.num_tokens(self._index)

    def get_max_length(self) -> int:
        """Return -1: there is no maximum but the capacities."""
        return -1

    get_max_cache_shape = get_max_length

    @property
    def batch_size(self) -> int:
        """Rows in the batch; -1 before the first token."""
        runtime = self._core.runtime
        if runtime is None or self._index not in runtime.layers:
            return -1
        return runtime.layers[self._index].tables.num_rows

    def reset(self) -> None:
        """Forget every token, in all offloaded layers of the cache: they share their tiers."""
        self._core.reset()

    def fork(self, core: CacheCore, binder: Binder, memo: dict[int, Any]) -> "OffloadedLayer":
        """Return this layer for a forked core."""
        return OffloadedLayer(core, self._index, binder)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last ``-tokens_to_remove`` tokens.

        A positive number was the length to keep before transformers 5.18, and is refused since.
        """
        tokens_to_remove, length = int(tokens_to_remove), self.get_seq_length()
        if tokens_to_remove > 0 and _compat.CROP_IS_RELATIVE:
            raise ValueError(
                f"crop({tokens_to_remove}): pass a negative number of tokens to remove"
            )
        kept = tokens_to_remove if tokens_to_remove > 0 else length + tokens_to_remove
        if kept < length and self._core.runtime is not None:
            self._core.runtime.crop(self._index, max(0, kept))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row ``i`` a copy of row ``beam_idx[i]``."""
        self._select(beam_idx.tolist())

    def batch_select_indices(self, indices: Tensor | tuple[Any, ...]) -> None:
        """Keep the rows at ``indices`` (integers or booleans, a tensor or a tuple)."""
        on_host = indices.cpu() if isinstance(indices, Tensor) else indices
        self._select(torch.arange(max(self.batch_size, 0))[on_host, ...].tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        self._select([row for row in range(max(self.batch_size, 0)) for _ in range(repeats)])

    def _select(self, indices: list[int]) -> None:
        if self._core.runtime is not None and self.is_initialized:
            self._core.runtime.select(self._index, indices)

    def _read(self, part: int) -> Tensor | None:
        if self._core.runtime is None or not self.is_initialized:
            return None
        return self._core.runtime.read_layer(self._index)[part]


def offloaded(stock: Any, core: CacheCore, index: int, binder: Binder) -> Any:
    """Return the layer to use where transformers' own cache would use ``stock``.

    Layers of bounded size (sliding windows, recurrent states) stay as they are.

    Raises
    ------
    ConfigError
        The layer grows without bound and has no offloaded form.
    """
    kind = type(stock).__name__
    if kind == "DynamicLayer":
        return OffloadedLayer(core, index, binder)
    if kind == "LinearAttentionAndFullAttentionLayer":
        from offload.hybrid import OffloadedHybridLayer  # transformers 5.4 has no such layer

        return OffloadedHybridLayer(core, index, binder, stock.number_of_states)
    if getattr(stock, "is_sliding", False) or kind in ("LinearAttentionLayer", "DummyLayer"):
        return stock
    raise ConfigError(
        f"layer {index} needs a {kind}, which OffloadedCache cannot offload; "
        "use DynamicCache(config=model.config) with this model"
    )
