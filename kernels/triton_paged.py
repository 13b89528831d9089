"""Launch an attention kernel over chunks, which may be the named slots of a pool."""

from typing import Any

from torch import Tensor

from offload.kernels.triton_launch import (
    on_device,
    padded,
    plan_splits,
    product_dtype,
    strides_of,
)
from offload.kernels.triton_merge import merge_splits, new_parts
from offload.kernels.triton_steps import LOG2_E
from offload.types import Partial


def attend_paged(
    kernel: Any,
    query: Tensor,
    tables: tuple[Tensor, ...],
    value_dim: int,
    *,
    scale: float,
    slots: Tensor | None,
    num_keys: int | None,
) -> Partial:
    """Run a kernel with one program per batch row, KV head and split of the keys, and merge.

    Parameters
    ----------
    kernel : triton.JITFunction
        Its parameters are those of ``_attend_chunks``.
    query : Tensor, shape (batch, num_heads, num_queries, key_dim)
    tables : tuple of Tensor, shape (batch or 1, num_chunks, num_kv_heads, chunk_tokens, ...)
        What the kernel reads of every key; with ``slots``, the chunks are the slots of a pool.
    value_dim : int
    scale : float
    slots : Tensor, int64 [batch, num_chunks], optional
    num_keys : int, optional
        Of each row of the batch, if the last chunk is not full.
    """
    batch, num_heads, num_queries, key_dim = query.shape
    num_kv_heads, chunk_tokens = tables[0].shape[2:4]
    num_chunks = tables[0].shape[1] if slots is None else slots.shape[1]
    num_keys = num_chunks * chunk_tokens if num_keys is None else num_keys
    num_rows = num_heads // num_kv_heads * num_queries
    pads = padded(key_dim), padded(value_dim)
    # Blocks are sized for the dtype of the query: quantised rows become that.
    row_bytes = sum(pads) * query.itemsize
    splits = plan_splits(query.device, batch * num_kv_heads, num_keys, row_bytes)
    out, lse = new_parts(query, value_dim, splits.num_splits)
    with on_device(query):
        kernel[(splits.num_splits, batch * num_kv_heads)](
            query.contiguous(),
            tables,
            tuple(strides_of(table) for table in tables),
            tables[0] if slots is None else slots.contiguous(),
            out,
            lse,
            (num_kv_heads, num_rows, num_keys, num_chunks, chunk_tokens, splits.split_keys),
            scale * LOG2_E,
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            ROWS=padded(num_rows),
            KEY_PAD=pads[0],
            VALUE_PAD=pads[1],
            BLOCK=splits.block,
            HAS_SLOTS=slots is not None,
            PRODUCT=product_dtype(query),
            num_warps=4,
            num_stages=3 if slots is None else 6,  # slots, then rows: two levels share them
        )
    return merge_splits(out, lse)
