"""Attention over rows by address with compiled kernels; ``kernels.rows`` is the definition."""

import torch
from torch import Tensor

from offload.kernels.cpu_products import BRAIN, FLOAT, HALF
from offload.kernels.cpu_rows_heads import attend_heads, copy_rows
from offload.kernels.cpu_threads import run_shares
from offload.types import Partial

_MOST_ROWS = 16
"""Queries of a KV head; with more, products of matrices are faster."""

_KINDS = {torch.float32: FLOAT, torch.bfloat16: BRAIN, torch.float16: HALF}


def supports(dtype: torch.dtype, key_dim: int, value_dim: int) -> bool:
    """Whether rows of a dtype and width can be attended here."""
    return dtype in _KINDS and key_dim % 16 == 0 and value_dim % 16 == 0


def attend_rows(
    query: Tensor, addresses: Tensor, rows_per_address: int, value_dim: int, dtype: torch.dtype
) -> Partial:
    """Attend as ``kernels.rows.attend_rows`` does. Thread-safe: no state."""
    num_heads, num_queries, _ = query.shape
    out = torch.empty(num_heads, num_queries, value_dim)
    lse = torch.empty(num_heads, num_queries)
    arrays = (query.contiguous().numpy(), addresses.contiguous().numpy())

    def kernel(share: int, num_shares: int) -> None:
        attend_heads(
            share, num_shares, *arrays, rows_per_address, _KINDS[dtype], out.numpy(), lse.numpy()
        )

    run_shares(kernel, num_heads)
    return Partial(out, lse)


def attends_chunks(query: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether ``attend_chunks`` takes these: few queries, rows of keys and values side by side."""
    key_dim, value_dim = keys.shape[-1], values.shape[-1]
    num_rows = query.shape[1] // keys.shape[2] * query.shape[2]
    return (
        num_rows <= _MOST_ROWS
        and query.device.type == "cpu"
        and query.dtype == keys.dtype
        and supports(keys.dtype, key_dim, value_dim)
        and keys.stride() == values.stride()
        and keys.stride()[3:] == (key_dim + value_dim, 1)
        and values.data_ptr() == keys.data_ptr() + key_dim * keys.itemsize
    )


def attend_chunks(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Partial:
    """Attend to whole chunks where they lie; shapes as for ``kernels.reference``."""
    batch, num_chunks, num_kv_heads, chunk_tokens, _ = keys.shape
    rows = (query.float() * scale).reshape(batch * num_kv_heads, -1, query.shape[-1])
    strides = [step * keys.itemsize for step in keys.stride()[:3]]
    first, chunk, head = (
        torch.arange(size) * step
        for size, step in zip((batch, num_chunks, num_kv_heads), strides, strict=True)
    )
    places = first.view(-1, 1, 1) + head.view(-1, 1) + chunk + keys.data_ptr()
    part = attend_rows(rows, places.flatten(0, 1), chunk_tokens, values.shape[-1], keys.dtype)
    shape = query.shape[:3]
    return Partial(part.out.view(*shape, -1), part.lse.view(shape))


def read_rows(addresses: Tensor, row_dim: int, dtype: torch.dtype) -> Tensor:
    """Copy rows as ``kernels.dispatch.read_rows`` does. Thread-safe: no state."""
    num_bytes = row_dim * dtype.itemsize
    out = torch.empty(*addresses.shape, num_bytes, dtype=torch.uint8)
    flat, places = out.view(-1, num_bytes).numpy(), addresses.flatten().numpy()
    run_shares(lambda share, num_shares: copy_rows(share, num_shares, places, flat), len(flat))
    return out.view(dtype)
