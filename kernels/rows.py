"""Attention over rows named by their addresses: the definition, in plain torch."""

import ctypes

import torch
from torch import Tensor

from offload.types import Partial


def attend_rows(
    query: Tensor, addresses: Tensor, rows_per_address: int, value_dim: int, dtype: torch.dtype
) -> Partial:
    """Attend to rows of keys and values that lie anywhere in host memory.

    Parameters
    ----------
    query : Tensor, shape (num_heads, num_queries, key_dim), float32
        Scaled.
    addresses : Tensor, int64 [num_heads, num_addresses]
        Of the first of ``rows_per_address`` rows that follow each other, keys then values, of that
        head; 0 where there are none. Whoever calls keeps the memory alive.
    rows_per_address, value_dim : int
    dtype : torch.dtype
        Of the rows.

    Returns
    -------
    Partial
        ``out`` [num_heads, num_queries, value_dim], ``lse`` [num_heads, num_queries]; no rows give
        zero and ``-inf``.
    """
    rows, have = read_rows(addresses, rows_per_address, query.shape[2] + value_dim, dtype)
    return attend_to(query, rows, have)


def attend_to(query: Tensor, rows: Tensor, have: Tensor) -> Partial:
    """Attend to rows that were copied together.

    Parameters
    ----------
    query : Tensor, shape (num_heads, num_queries, key_dim), float32
        Scaled.
    rows : Tensor, shape (num_heads, num_rows, key_dim + value_dim)
    have : Tensor, bool [num_heads, num_rows]
        Which of them there are.
    """
    rows = rows.float()
    keys, values = rows[..., : query.shape[2]], rows[..., query.shape[2] :]
    logits = torch.bmm(query, keys.mT).masked_fill(~have.unsqueeze(1), -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.nan_to_num(neginf=0.0).unsqueeze(-1)).exp()
    return Partial(torch.bmm(weights, values), lse)


def read_rows(
    addresses: Tensor, rows_per_address: int, row_dim: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Copy rows from host memory.

    Returns
    -------
    rows : Tensor, shape (num_heads, num_addresses * rows_per_address, row_dim)
        Zero where there are none.
    have : Tensor, bool [num_heads, num_addresses * rows_per_address]
    """
    num_bytes = rows_per_address * row_dim * dtype.itemsize
    flat = torch.zeros(addresses.numel(), num_bytes, dtype=torch.uint8)
    for line, address in zip(flat, addresses.flatten().tolist(), strict=True):
        if address:
            ctypes.memmove(line.data_ptr(), address, num_bytes)
    rows = flat.view(dtype).view(len(addresses), -1, row_dim)
    return rows, (addresses != 0).repeat_interleave(rows_per_address, 1)
