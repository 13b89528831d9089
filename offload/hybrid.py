"""Layers that have both full attention and a recurrent state."""

from copy import deepcopy
from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from offload.core import CacheCore
from offload.layers import OffloadedLayer
from offload.masks import Binder


class OffloadedHybridLayer(  # type: ignore[misc] # the bases disagree in transformers too
    OffloadedLayer, LinearAttentionAndFullAttentionLayer
):
    """A layer with both full attention and a recurrent state, which stays on the device.

    Parameters
    ----------
    core, index, binder
        As for ``OffloadedLayer``.
    number_of_states : int
    """

    def __init__(self, core: CacheCore, index: int, binder: Binder, number_of_states: int) -> None:
        OffloadedLayer.__init__(self, core, index, binder)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def fork(self, core: CacheCore, binder: Binder, memo: dict[int, Any]) -> OffloadedLayer:
        """Return this layer for a forked core, with a copy of the recurrent state."""
        copy = type(self)(core, self._index, binder, self.number_of_states)
        own = {"_core", "_index", "_binder"}
        state = {key: value for key, value in vars(self).items() if key not in own}
        vars(copy).update(deepcopy(state, memo))
        return copy

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Initialise the recurrent state; the attention part needs nothing."""
        if kwargs:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    def reset(self) -> None:
        """Forget every token and the recurrent state."""
        LinearAttentionLayer.reset(self)
        OffloadedLayer.reset(self)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make row ``i`` a copy of row ``beam_idx[i]``."""
        LinearAttentionLayer.reorder_cache(self, beam_idx)  # type: ignore[arg-type]
        OffloadedLayer.reorder_cache(self, beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens, where the recurrent state allows it."""
        LinearAttentionLayer.crop(self, tokens_to_remove)
        OffloadedLayer.crop(self, tokens_to_remove)
