"""Dense attention over all keys in memory, in the fastest form that torch has on this machine."""

import statistics
import time
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_TRIALS: Final = 3


def packed(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend with the queries of a group as queries of their KV head."""
    batch, num_heads, _, dim = query.shape
    grouped = query.reshape(batch, keys.shape[1], num_heads // keys.shape[1], dim)
    return scaled_dot_product_attention(grouped, keys, values).reshape(batch, 1, num_heads, -1)


def grouped(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend with torch's own grouping of heads."""
    found = scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    return found.transpose(1, 2)


FORMS: Final[dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]] = {
    "packed": packed,
    "enable_gqa": grouped,
}
"""Of one query per row: ``[batch, num_heads, 1, dim]``, keys and values ``[batch, num_kv_heads,
num_keys, dim]`` to ``[batch, 1, num_heads, dim]``."""


class DenseCache:
    """Keys and values of every layer, in tensors that are as large as they will get.

    A harder opponent than ``DynamicCache``, which copies all it holds at every step.

    Parameters
    ----------
    num_layers, batch, num_kv_heads, num_tokens, head_dim : int
        ``num_tokens`` at the end.
    dtype : torch.dtype
    device : torch.device
    """

    def __init__(
        self,
        num_layers: int,
        batch: int,
        num_kv_heads: int,
        num_tokens: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        size = (num_layers, 2, batch, num_kv_heads, num_tokens, head_dim)
        self._states = torch.empty(size, dtype=dtype, device=device)
        self._lengths = [0] * num_layers
        self.form = "packed"

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Append the tokens of one layer; return views of all that it holds."""
        start, stop = self._lengths[layer], self._lengths[layer] + keys.shape[2]
        own = self._states[layer]
        own[0, :, :, start:stop] = keys
        own[1, :, :, start:stop] = values
        self._lengths[layer] = stop
        return own[0, :, :, :stop], own[1, :, :, :stop]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attend in the form that was chosen; shapes as in ``FORMS``."""
        return FORMS[self.form](query, keys, values)

    def choose_form(self, query: Tensor) -> None:
        """Time both forms on the first layer, and keep the faster one."""
        keys, values = (part[:, :, : self._lengths[0]] for part in self._states[0])
        self.form = min(FORMS, key=lambda name: _seconds(FORMS[name], query, keys, values))


def _seconds(form: Callable[..., Tensor], query: Tensor, keys: Tensor, values: Tensor) -> float:
    times = []
    for _ in range(_TRIALS + 1):
        started = time.perf_counter()
        form(query, keys, values)
        if query.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
