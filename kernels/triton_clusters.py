"""First pass of a scan: the logit of every cluster, its hoped mass, and which clusters to scan.

The definition: ``kernels.scan``. Queries are rounded to 16 bits, as two digits of 8, so that the
products with centroids of 8 bits are exact and run on the matrix units.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.errors import ConfigError
from offload.kernels.scan import DEVIATIONS, Combine, ScanTables, combine_shares
from offload.kernels.triton_launch import LEAST_DOT, on_device, padded

LEAST_BYTE_DOT = 32
"""Of a product of bytes: the elements of a row, at least."""

_TILE = 64
_MOST_CLUSTERS = 1 << 16
_WIDEST = tl.constexpr(32639.0)
"""The largest number whose upper digit, after rounding, fits into 8 bits with its sign."""


@triton.jit
def _score_clusters(
    query: tl.tensor,
    centroids: tl.tensor,
    centroid_scale: tl.tensor,
    counts: tl.tensor,
    radius: tl.tensor,
    logits: tl.tensor,
    hoped: tl.tensor,
    num_queries: tl.tensor,
    num_clusters: tl.tensor,
    deviations: tl.tensor,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    PAD: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    head = tl.program_id(1).to(tl.int64)
    cluster, row, column = (
        tl.program_id(0) * TILE + tl.arange(0, TILE),
        tl.arange(0, ROWS),
        tl.arange(0, PAD),
    )
    has_cluster, has_row, has_column = cluster < num_clusters, row < num_queries, column < DIM
    places = query + (head * num_queries + row)[:, None] * DIM + column[None, :]
    queries = tl.load(places, mask=has_row[:, None] & has_column[None, :], other=0.0)
    unit = tl.maximum(tl.max(tl.abs(queries), 1), 1e-30) / _WIDEST
    wide = tl.floor(queries / unit[:, None] + 0.5).to(tl.int32)
    low = ((wide + 128) & 255) - 128
    high = (wide - low) >> 8
    own = head * num_clusters + cluster
    places = centroids + own[:, None] * DIM + column[None, :]
    means = tl.trans(tl.load(places, mask=has_cluster[:, None] & has_column[None, :], other=0))
    product = tl.dot(high.to(tl.int8), means).to(tl.float32) * 256.0
    product += tl.dot(low.to(tl.int8), means).to(tl.float32)
    scale = tl.load(centroid_scale + own, mask=has_cluster, other=0.0).to(tl.float32)
    logit = product * unit[:, None] * scale[None, :]
    count = tl.load(counts + own, mask=has_cluster, other=0).to(tl.float32)
    reach = tl.load(radius + own, mask=has_cluster, other=0.0).to(tl.float32) * deviations
    length = tl.sqrt(tl.sum(queries * queries, 1))
    mass = tl.where(count > 0, tl.log(tl.maximum(count, 1.0)), float("-inf"))
    hope = logit + mass[None, :] + length[:, None] * reach[None, :]
    places = (head * num_queries + row)[:, None] * num_clusters + cluster[None, :]
    mask = has_row[:, None] & has_cluster[None, :]
    tl.store(logits + places, logit, mask=mask)
    tl.store(hoped + places, hope, mask=mask)


@triton.jit
def _choose_clusters(
    shares: tl.tensor,
    counts: tl.tensor,
    chosen: tl.tensor,
    num_clusters: tl.tensor,
    wanted: tl.tensor,
    CLUSTERS: tl.constexpr,
) -> None:
    head = tl.program_id(0).to(tl.int64)
    cluster = tl.arange(0, CLUSTERS)
    has_cluster = cluster < num_clusters
    own = head * num_clusters + cluster
    share = tl.load(shares + own, mask=has_cluster, other=float("-inf"))
    count = tl.load(counts + own, mask=has_cluster, other=0).to(tl.int32)
    # The bits of a float, as an unsigned number of the same order.
    bits = share.to(tl.int32, bitcast=True)
    rank = (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)
    least = tl.zeros([1], tl.uint32)
    for step in tl.static_range(32):
        higher = least | (1 << (31 - step))
        mass = tl.sum(tl.where(rank >= higher, count, 0), 0)
        least = tl.where(mass >= wanted, higher, least)
    tl.store(chosen + own, (rank >= least).to(tl.int8), mask=has_cluster)


def supports(tables: ScanTables, query: Tensor) -> bool:
    """Whether the passes take these; shapes as there."""
    return query.shape[1] <= LEAST_DOT and tables.counts.shape[1] <= _MOST_CLUSTERS


def score_clusters(tables: ScanTables, query: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logit of the mean key of each cluster, and the log of the mass it may have.

    Parameters
    ----------
    tables : ScanTables
    query : Tensor, shape (num_heads, num_queries, key_dim), float32
        Scaled; at most 16 for each head.

    Returns
    -------
    logits, hoped : Tensor, shape (num_heads, num_queries, num_clusters), float32
        ``hoped`` counts every key of a cluster as three deviations above the mean.
    """
    num_heads, num_queries, dim = query.shape
    num_clusters = tables.counts.shape[1]
    logits = query.new_empty(num_heads, num_queries, num_clusters)
    hoped = torch.empty_like(logits)
    with on_device(query):
        _score_clusters[(triton.cdiv(num_clusters, _TILE), num_heads)](
            query.contiguous(),
            tables.centroids,
            tables.centroid_scale,
            tables.counts,
            tables.radius,
            logits,
            hoped,
            num_queries,
            num_clusters,
            DEVIATIONS / math.sqrt(dim),
            DIM=dim,
            ROWS=LEAST_DOT,
            PAD=padded(dim, LEAST_BYTE_DOT),
            TILE=_TILE,
            num_warps=4,
        )
    return logits, hoped


def choose_clusters(tables: ScanTables, hoped: Tensor, budget: int, group: Combine) -> Tensor:
    """Return which clusters to scan: the best ones that together have enough tokens.

    Clusters are taken by the bits of a threshold, from the highest down, so nothing is sorted.
    Unlike ``kernels.scan``, clusters that tie with the last one taken are taken as well.

    Parameters
    ----------
    tables : ScanTables
    hoped : Tensor, shape (num_heads, num_queries, num_clusters), float32
    budget : int
        Tokens that will be read.
    group : {"max", "sum"}

    Returns
    -------
    Tensor, int8 [num_heads, num_clusters]
        1 for those to scan, else 0.

    Raises
    ------
    ConfigError
        More than 65,536 clusters: they do not fit into the registers of one program.
    """
    shares = combine_shares(torch.log_softmax(hoped, -1), group).contiguous()
    num_heads, num_clusters = shares.shape
    if num_clusters > _MOST_CLUSTERS:
        raise ConfigError(
            f"a head has {num_clusters} clusters, at most {_MOST_CLUSTERS} are ranked"
        )
    size = padded(num_clusters)
    chosen = torch.empty_like(shares, dtype=torch.int8)
    with on_device(shares):
        _choose_clusters[(num_heads,)](
            shares,
            tables.counts,
            chosen,
            num_clusters,
            tables.wanted(budget),
            CLUSTERS=size,
            num_warps=min(32, max(4, size // 512)),
        )
    return chosen
