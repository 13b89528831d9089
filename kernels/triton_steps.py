"""What attention kernels are made of: where rows are, the softmax along the keys, a part stored.

Scores are in units of log 2, which is what the hardware's exponential takes.
"""

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634

_LN_2 = tl.constexpr(0.6931471805599453)
_TINY = tl.constexpr(1e-37)


@triton.jit
def load_rows(
    places: tl.tensor, has_row: tl.tensor, DIM: tl.constexpr, PAD: tl.constexpr
) -> tl.tensor:
    """Return ``[rows, PAD]`` elements from pointers to the first of each row, zero where none."""
    column = tl.arange(0, PAD)
    mask = has_row[:, None] & (column < DIM)[None, :]
    return tl.load(places[:, None] + column[None, :], mask=mask, other=0)


@triton.jit
def find_chunks(
    slots: tl.tensor,
    key: tl.tensor,
    has_key: tl.tensor,
    chunk_tokens: tl.tensor,
    HAS_SLOTS: tl.constexpr,
) -> tl.tensor:
    """Return the chunk, by way of the slots if there are any, and the token in it of each key."""
    chunk = (key // chunk_tokens).to(tl.int64)
    if HAS_SLOTS:
        chunk = tl.load(slots + chunk, mask=has_key, other=0)
    return chunk, key % chunk_tokens


@triton.jit
def places_of(
    rows: tl.tensor,
    strides: tl.tensor,
    batch: tl.tensor,
    head: tl.tensor,
    chunk: tl.tensor,
    token: tl.tensor,
) -> tl.tensor:
    """Return pointers to the first element of rows; strides of batch, chunk, head and token."""
    return rows + batch * strides[0] + head * strides[2] + chunk * strides[1] + token * strides[3]


@triton.jit
def hide(scores: tl.tensor, is_seen: tl.tensor) -> tl.tensor:
    """Return scores ``[rows, keys]`` with ``-inf`` for keys that are not seen."""
    return tl.where(is_seen[None, :], scores, float("-inf"))


@triton.jit
def weigh(scores: tl.tensor, peak: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Return the weights of new scores, what older sums shrink by, and the new peak and total."""
    top = tl.maximum(peak, tl.max(scores, 1))
    # A row that has seen nothing yet has no peak to be relative to.
    level = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(scores - level[:, None])
    shrink = tl.exp2(peak - level)
    return weights, shrink, top, total * shrink + tl.sum(weights, 1)


@triton.jit
def fold(
    queries: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    is_seen: tl.tensor,
    scale: tl.tensor,
    peak: tl.tensor,
    total: tl.tensor,
    sums: tl.tensor,
) -> tl.tensor:
    """Return peak, total and weighted sums with a block of keys and values added."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale
    weights, shrink, peak, total = weigh(hide(scores, is_seen), peak, total)
    sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
    return peak, total, sums


@triton.jit
def normal_lse(peak: tl.tensor, total: tl.tensor) -> tl.tensor:
    """Return the log-sum-exp in nats, ``-inf`` for rows that saw nothing."""
    lse = (peak + tl.log2(tl.maximum(total, _TINY))) * _LN_2
    return tl.where(total > 0, lse, float("-inf"))


@triton.jit
def store_rows(
    out: tl.tensor,
    place: tl.tensor,
    has_row: tl.tensor,
    sums: tl.tensor,
    total: tl.tensor,
    DIM: tl.constexpr,
    PAD: tl.constexpr,
) -> None:
    """Write weighted means as rows number ``place`` of ``out``; zero for rows that saw nothing."""
    column = tl.arange(0, PAD)
    mask = has_row[:, None] & (column < DIM)[None, :]
    means = sums / tl.maximum(total, _TINY)[:, None]
    tl.store(out + place[:, None] * DIM + column[None, :], means, mask=mask)
