"""Some queries of a prompt, kept for indexes that are built for queries such as these."""

from collections.abc import Hashable

import torch
from torch import Tensor


class QuerySample:
    """Evenly spread queries of each layer and row, at most twice as many as asked for.

    When there are more, every second one is dropped, and of later ones as many are left out: the
    same queries are kept whatever the pieces that a prompt is read in.

    Parameters
    ----------
    most : int
        Positions to keep, per key; 0 keeps none.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._kept: dict[Hashable, Tensor] = {}
        self._stride: dict[Hashable, int] = {}
        self._seen: dict[Hashable, int] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of what is kept."""
        return sum(kept.nbytes for kept in self._kept.values())

    def add(self, key: Hashable, query: Tensor) -> None:
        """Look at the queries of one call.

        Parameters
        ----------
        key : hashable
            Layer and row.
        query : Tensor, shape (num_heads, num_queries, key_dim)
        """
        if not self._most:
            return
        seen, stride = self._seen.get(key, 0), self._stride.get(key, 1)
        chosen = query[:, -seen % stride :: stride]
        kept = torch.cat([self._kept[key], chosen], 1) if key in self._kept else chosen.clone()
        while kept.shape[1] > 2 * self._most:
            kept, stride = kept[:, ::2].clone(), 2 * stride
        self._kept[key], self._stride[key], self._seen[key] = kept, stride, seen + query.shape[1]

    def get(self, key: Hashable, num_kv_heads: int) -> Tensor | None:
        """Return what is kept, ``[num_kv_heads, num_queries, key_dim]``: a group's together."""
        kept = self._kept.get(key)
        return None if kept is None else kept.reshape(num_kv_heads, -1, kept.shape[-1])
