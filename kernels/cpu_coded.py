"""Attention over encoded chunks with compiled kernels. Needs numba.

By definition, attention over what the codec decodes, in float32 and not rounded further.
"""

import torch
from torch import Tensor

from offload.kernels.cpu_coded_heads import FP8, INT8, KIVI2, KIVI4, attend_units
from offload.kernels.cpu_threads import run_shares
from offload.types import Partial

_MOST_ROWS = 16
"""Queries of a KV head; with more, products of matrices over decoded rows are faster."""

_CODECS = (INT8, FP8, KIVI4, KIVI2)


def supports(codec: int, key_dim: int, value_dim: int, num_rows: int) -> bool:
    """Whether units of a codec, by its number, can be attended here by queries of a KV head."""
    return codec in _CODECS and key_dim % 16 == 0 and value_dim % 16 == 0 and num_rows <= _MOST_ROWS


def attend_codes(
    query: Tensor,
    slab: Tensor,
    places: Tensor,
    *,
    unit_bytes: int,
    unit_tokens: int,
    value_dim: int,
    codec: int,
) -> Partial | None:
    """Attend with all queries of a head to all of its units. Thread-safe: no state.

    Parameters
    ----------
    query : Tensor, shape (num_heads, num_queries, key_dim), float32
        Scaled; KV heads, with the queries of their group.
    slab : Tensor, uint8 [num_bytes]
    places : Tensor, int64 [num_heads, num_units]
        Where units begin in it.
    unit_bytes, unit_tokens : int
        Of each unit.
    value_dim : int
    codec : int
        Its number.

    Returns
    -------
    Partial or None
        ``out`` [num_heads, num_queries, value_dim] and ``lse``, float32. None: a unit holds
        numbers that are not for kernels, and has to be decoded.
    """
    num_heads, num_queries, _ = query.shape
    out = torch.empty(num_heads, num_queries, value_dim)
    lse = torch.empty(num_heads, num_queries)
    is_done = torch.empty(num_heads, dtype=torch.bool)
    inputs = (query.contiguous().numpy(), slab.numpy(), places.contiguous().numpy())
    outputs = (out.numpy(), lse.numpy(), is_done.numpy())

    def kernel(share: int, num_shares: int) -> None:
        attend_units(share, num_shares, *inputs, unit_bytes, unit_tokens, codec, *outputs)

    run_shares(kernel, num_heads)
    return Partial(out, lse) if bool(is_done.all()) else None
