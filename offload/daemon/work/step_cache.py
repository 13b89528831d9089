"""One forward pass over the next tokens of several caches of different lengths.

The model sees one batch: its products with weights are shared. Keys and values are not: row ``i``
is appended to cache ``i``, and attends to that one alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from offload import OffloadedCache
from offload.daemon.work.step_attention import StepAttention
from offload.exact import AttentionCall
from offload.handle import Handle, stand_ins
from offload.layers import OffloadedLayer
from offload.masks import MaskLength

if TYPE_CHECKING:
    from offload.core import CacheCore


class RowFailed(Exception):
    """The step failed for one row; ``__cause__`` says why.

    Parameters
    ----------
    row : int
    """

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row} failed")
        self.row = row


@dataclass(frozen=True, slots=True)
class StepHandle(Handle):
    """The keys and values of one layer of all rows; the handle itself is that of the first.

    Attributes
    ----------
    rows : list of Handle
    together : StepAttention
    """

    rows: list[Handle]
    together: StepAttention

    def attend(self, call: AttentionCall) -> Tensor:
        """Attend for every row; see ``Handle.attend``."""
        attended = self.together.attend(call, self.rows)
        if attended is not None:
            return attended
        return torch.cat([self._attend_row(i, call) for i in range(len(self.rows))])

    def _attend_row(self, row: int, call: AttentionCall) -> Tensor:
        try:
            return self.rows[row].attend(replace(call, query=call.query[row : row + 1]))
        except Exception as error:
            raise RowFailed(row) from error


class StepLayer(CacheLayerMixin):
    """One layer of the caches of a step.

    Parameters
    ----------
    index : int
    step : StepCache
    """

    is_compileable = False
    is_sliding = False

    def __init__(self, index: int, step: "StepCache") -> None:
        self._index = index
        self._step = step

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """Whether the layer has seen a token; always."""
        return True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the caches are open."""

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append row ``i`` to cache ``i``; see ``OffloadedLayer.update``."""
        rows = []
        for i, core in enumerate(self._step.cores):
            try:
                appended = core.append(self._index, key_states[i : i + 1], value_states[i : i + 1])
            except Exception as error:
                raise RowFailed(i) from error
            rows.append(Handle(core, self._index, appended))
        handle = StepHandle(rows[0].core, self._index, rows[0].appended, rows, self._step.together)
        return stand_ins(handle, key_states, value_states, self.get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and offset of the keys that the next mask covers."""
        return MaskLength(self.get_seq_length() + query_length, self._step), 0

    def get_seq_length(self) -> int:
        """Return the tokens of the longest row."""
        return max(core.num_tokens(self._index) for core in self._step.cores)

    def get_max_length(self) -> int:
        """Return -1: there is no maximum but the capacities."""
        return -1

    get_max_cache_shape = get_max_length


class StepCache(Cache):
    """Caches of one row each, as one cache of several rows, for one token per row.

    Parameters
    ----------
    caches : sequence of OffloadedCache
        Forks of one cache, all layers offloaded, each with a token at least; see ``can_share``.
    together : StepAttention
    """

    def __init__(self, caches: Sequence[OffloadedCache], together: StepAttention) -> None:
        self.cores: list[CacheCore] = [cache._core for cache in caches]
        self.together = together
        self._caches = list(caches)
        self._lengths = [cache.get_seq_length() for cache in caches]
        super().__init__(layers=[StepLayer(i, self) for i in range(len(caches[0].layers))])

    @property
    def offloads(self) -> bool:
        """Whether any layer is offloaded; all are."""
        return True

    @property
    def position_ids(self) -> Tensor:
        """Where the next tokens stand, int64 ``[num_rows, 1]``."""
        return torch.tensor(self._lengths)[:, None]

    def bind(self, config: Any) -> None:
        """Do nothing: the caches know their model."""

    def undo(self) -> None:
        """Take the step back in every cache, wherever it was interrupted."""
        for cache, length in zip(self._caches, self._lengths, strict=True):
            cut_back(cache, length)


def cut_back(cache: OffloadedCache, num_tokens: int) -> None:
    """Take back what a step that was interrupted has appended to some of the layers."""
    for layer in cache.layers:
        if layer.get_seq_length() > num_tokens:
            layer.crop(num_tokens - layer.get_seq_length())


def can_share(cache: OffloadedCache) -> bool:
    """Whether a cache can take part in steps with others: no layer keeps a state of its own."""
    return cache._core.latent_dims is None and all(
        type(layer) is OffloadedLayer for layer in cache.layers
    )
