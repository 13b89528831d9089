"""Merge the parts that several programs found, by their log-sum-exps."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.triton_launch import on_device, padded
from offload.kernels.triton_steps import normal_lse
from offload.types import Partial

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _merge_splits(
    part_out: tl.tensor,
    part_lse: tl.tensor,
    out: tl.tensor,
    lse: tl.tensor,
    num_splits: tl.tensor,
    dim: tl.tensor,
    SPLITS: tl.constexpr,
    PAD: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    split, column = tl.arange(0, SPLITS), tl.arange(0, PAD)
    has_split = split < num_splits
    part = row * num_splits + split
    scores = tl.load(part_lse + part, mask=has_split, other=float("-inf")) * _LOG2_E
    top = tl.max(scores, 0)
    weights = tl.exp2(scores - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0)
    mask = has_split[:, None] & (column < dim)[None, :]
    parts = tl.load(part_out + part[:, None] * dim + column[None, :], mask=mask, other=0.0)
    # Each part is a mean, so an empty one has a zero output and a zero weight.
    merged = tl.sum(parts * weights[:, None], 0) / tl.where(total > 0, total, 1.0)
    tl.store(out + row * dim + column, merged, mask=column < dim)
    tl.store(lse + row, normal_lse(top, total))


def merge_splits(out: Tensor, lse: Tensor) -> Partial:
    """Merge what each split found, as ``kernels.reference.merge`` does.

    Parameters
    ----------
    out : Tensor, shape (batch, num_heads, num_queries, num_splits, value_dim), float32
    lse : Tensor, shape (batch, num_heads, num_queries, num_splits), float32
        Both contiguous.

    Returns
    -------
    Partial
    """
    *shape, num_splits, dim = out.shape
    if num_splits == 1:
        return Partial(out.squeeze(3), lse.squeeze(3))
    merged = Partial(out.new_empty(*shape, dim), lse.new_empty(shape))
    with on_device(out):
        _merge_splits[(merged.lse.numel(),)](
            out,
            lse,
            merged.out,
            merged.lse,
            num_splits,
            dim,
            SPLITS=padded(num_splits, 2),
            PAD=padded(dim),
            num_warps=4,
        )
    return merged


def new_parts(query: Tensor, value_dim: int, num_splits: int) -> tuple[Tensor, Tensor]:
    """Return room for what ``merge_splits`` merges, float32 on the device of the query.

    Parameters
    ----------
    query : Tensor, shape (batch, num_heads, num_queries, key_dim)
    value_dim, num_splits : int
    """
    shape = (*query.shape[:3], num_splits)
    out = query.new_empty(*shape, value_dim, dtype=torch.float32)
    return out, query.new_empty(shape, dtype=torch.float32)
