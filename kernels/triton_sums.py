"""What clusters weigh after a scan: their scanned places one by one, the others as their mean.

The definition: ``kernels.scan``. The places of a cluster are consecutive, so each sum belongs to
one program, and results do not depend on the order in which programs run.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.scan import ScanTables
from offload.kernels.triton_launch import on_device
from offload.kernels.triton_steps import normal_lse, weigh

TILE_CLUSTERS = 32
"""Clusters of one program that walks over their places, 16 of each at a time."""

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sum_clusters(
    logits: tl.tensor,
    raw: tl.tensor,
    scanned: tl.tensor,
    key_scale: tl.tensor,
    starts: tl.tensor,
    counts: tl.tensor,
    spread: tl.tensor,
    noise: tl.tensor,
    total: tl.tensor,
    masses: tl.tensor,
    squares: tl.tensor,
    num_queries: tl.tensor,
    num_clusters: tl.tensor,
    num_places: tl.tensor,
    HAS_TOTAL: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    head = row // num_queries
    cluster, lane = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, 16)
    has_cluster = cluster < num_clusters
    own = head * num_clusters + cluster
    start = tl.load(starts + own, mask=has_cluster, other=0)
    count = tl.load(counts + own, mask=has_cluster, other=0).to(tl.int32)
    unit = tl.load(noise + row)
    whole = tl.load(total + row) if HAS_TOTAL else 0.0
    peak = tl.full([TILE], float("-inf"), tl.float32)
    mass, twice = tl.zeros([TILE], tl.float32), tl.zeros([TILE], tl.float32)
    left = count
    for first in tl.range(0, tl.max(count, 0), 16):
        number = first + lane[None, :]
        place = start[:, None] + number
        is_own = number < count[:, None]
        block = head * (num_places // 16) + place // 16
        is_scanned = tl.load(scanned + block, mask=is_own, other=0) > 0
        logit = tl.load(raw + row * num_places + place, mask=is_scanned, other=float("-inf"))
        scale = tl.load(key_scale + head * num_places + place, mask=is_scanned, other=0.0)
        deviation = unit * scale.to(tl.float32)
        logit -= deviation * deviation / 4
        _, _, peak, mass = weigh(logit * _LOG2_E, peak, mass)
        left -= tl.sum(is_scanned.to(tl.int32), 1)
        if HAS_TOTAL:
            share = tl.exp(logit - whole)
            twice += tl.sum(share * share, 1)
    at = row * num_clusters + cluster
    others = tl.load(logits + at, mask=has_cluster, other=0.0)
    others = tl.where(left > 0, others + tl.log(tl.maximum(left, 1).to(tl.float32)), float("-inf"))
    tokens = normal_lse(peak, mass)
    top = tl.maximum(tokens, others)
    level = tl.where(top == float("-inf"), 0.0, top)
    # At least one of them is the larger, so 1 is the least there is unless there is nothing.
    both = tl.maximum(tl.exp(tokens - level) + tl.exp(others - level), 1.0)
    tl.store(masses + at, top + tl.log(both), mask=has_cluster)
    if HAS_TOTAL:
        share = tl.exp(others - whole)
        error = tl.load(spread + own, mask=has_cluster, other=0.0).to(tl.float32)
        twice += share * share / tl.maximum(left, 1).to(tl.float32)
        found = row * tl.num_programs(0) + tl.program_id(0)
        tl.store(squares + found, tl.sum(error * error * twice, 0))


class Places(NamedTuple):
    """What is known of places after ``score_places``.

    Attributes
    ----------
    raw : Tensor, shape (num_heads, num_queries, num_places), float32
        Estimated logits; ``-inf`` for filling and hits. Nothing of use where not scanned.
    scanned : Tensor, int8 [num_heads, num_places / 16]
        1 for blocks that were.
    starts : Tensor, int32 [num_heads, num_clusters]
        Place of the first key of each cluster.
    noise : Tensor, shape (num_heads, num_queries), float32
        Deviation of a logit, per unit of the scale of its key.
    """

    raw: Tensor
    scanned: Tensor
    starts: Tensor
    noise: Tensor


def sum_clusters(
    tables: ScanTables, places: Places, logits: Tensor, total: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return what each cluster weighs: its scanned places one by one, the others as their mean.

    Parameters
    ----------
    tables : ScanTables
    places : Places
    logits : Tensor, shape (num_heads, num_queries, num_clusters), float32
    total : Tensor, shape (num_heads, num_queries), float32, optional
        Log of the whole softmax, to sum errors by.

    Returns
    -------
    masses : Tensor, shape (num_heads, num_queries, num_clusters), float32
        Logs; ``-inf`` for clusters without a key.
    squares : Tensor, shape (num_heads, num_queries), float32
        Sum of the expected squared errors of all that counts; zero without ``total``.
    """
    num_heads, num_queries, num_clusters = logits.shape
    masses = torch.empty_like(logits)
    num_tiles = triton.cdiv(num_clusters, TILE_CLUSTERS)
    squares = logits.new_zeros(num_heads, num_queries, num_tiles)
    with on_device(logits):
        _sum_clusters[(num_tiles, num_heads * num_queries)](
            logits,
            places.raw,
            places.scanned,
            tables.key_scale,
            places.starts,
            tables.counts,
            tables.spread,
            places.noise,
            logits if total is None else total,
            masses,
            squares,
            num_queries,
            num_clusters,
            places.raw.shape[2],
            HAS_TOTAL=total is not None,
            TILE=TILE_CLUSTERS,
            num_warps=4,
        )
    return masses, squares.sum(-1)
