"""Mean keys of the units of one layer: what a question is compared with."""

import torch
from torch import Tensor


class MeanKeys:
    """Rows that grow in memory that doubles, so that all of them are one tensor at any time."""

    def __init__(self) -> None:
        self._rows = torch.empty(0)
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def extend(self, rows: Tensor) -> None:
        """Add rows, ``[num_units, num_kv_heads, key_dim]``."""
        end = self._count + len(rows)
        if end > len(self._rows):
            room = rows.new_empty(max(end, 2 * len(self._rows)), *rows.shape[1:])
            if self._count:
                room[: self._count] = self._rows[: self._count]
            self._rows = room
        self._rows[self._count : end] = rows
        self._count = end

    def first(self, count: int) -> Tensor:
        """Return the first rows; a view."""
        return self._rows[: min(count, self._count)]

    def truncate(self, count: int) -> None:
        """Keep the first rows."""
        self._count = min(count, self._count)


def means_of(keys: Tensor, sizes: list[int]) -> Tensor:
    """Return the mean key of each unit and KV head.

    Parameters
    ----------
    keys : Tensor, shape (num_kv_heads, num_tokens, key_dim)
    sizes : list of int
        Tokens of each unit.

    Returns
    -------
    Tensor, shape (num_units, num_kv_heads, key_dim), dtype of the keys
        Summed up in float32.
    """
    if len(set(sizes)) == 1:
        heads, dim = keys.shape[0], keys.shape[2]
        means = keys.float().reshape(heads, len(sizes), sizes[0], dim).mean(2).transpose(0, 1)
    else:
        means = torch.stack([part.float().mean(1) for part in keys.split(sizes, 1)])
    return means.to(keys.dtype)
