"""The scan of ``kernels.scan`` on a CUDA device: a chain of kernels that the host never waits for.

Clusters are scored and chosen, places of the chosen ones scored, the best taken out, and what all
others weigh is summed up. The host queues the whole chain at once, on the current stream.
"""

import functools
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels import triton_clusters
from offload.kernels.codes import BLOCK_PLACES
from offload.kernels.scan import Combine, Scan, ScanTables, Sizes, num_places
from offload.kernels.triton_clusters import choose_clusters, score_clusters
from offload.kernels.triton_hits import take_hits
from offload.kernels.triton_launch import on_device
from offload.kernels.triton_places import score_places
from offload.kernels.triton_sums import TILE_CLUSTERS, Places, sum_clusters
from offload.kernels.triton_values import sum_residuals, weigh_rows
from offload.types import Partial

_MOST_DIM = 256


@triton.jit
def _own_places(
    starts: tl.tensor,
    counts: tl.tensor,
    owner: tl.tensor,
    num_clusters: tl.tensor,
    num_places: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    head = tl.program_id(1).to(tl.int64)
    cluster, lane = tl.program_id(0) * TILE + tl.arange(0, TILE), tl.arange(0, 16)
    has_cluster = cluster < num_clusters
    start = tl.load(starts + head * num_clusters + cluster, mask=has_cluster, other=0)
    count = tl.load(counts + head * num_clusters + cluster, mask=has_cluster, other=0).to(tl.int32)
    own = tl.broadcast_to(cluster[:, None], (TILE, 16)).to(owner.dtype.element_ty)
    for first in tl.range(0, tl.max(count, 0), 16):
        number = first + lane[None, :]
        places = owner + head * num_places + start[:, None] + number
        tl.store(places, own, mask=number < count[:, None])


def supports(tables: ScanTables, query: Tensor) -> bool:
    """Whether ``scan`` takes these; shapes as there."""
    dims = query.shape[2], tables.value_means.shape[2]
    return max(dims) <= _MOST_DIM and triton_clusters.supports(tables, query)


def scan(tables: ScanTables, query: Tensor, budget: int, group: Combine) -> Scan:
    """Scan as ``kernels.scan.scan`` does, queued on the current stream.

    Unlike there, clusters that tie with the last one chosen are scanned too, and ``num_scanned`` is
    a tensor: reading it waits for the device. Thread-safe: no state.

    Parameters
    ----------
    tables : ScanTables
        On the device of the query. Views of the beginning of larger ones are copied first.
    query : Tensor, shape (num_heads, num_queries, key_dim), float32
        Scaled; at most 16 for each head.
    budget : int
    group : {"max", "sum"}
    """
    tables = _contiguous(tables)
    outline = _outline(tables.sizes, query.device)
    counts = tables.counts
    # Filling counts with the cluster after it, so that its own keys begin behind.
    starts = (counts + outline.filling).cumsum(1, dtype=torch.int32) - counts
    logits, hoped = score_clusters(tables, query)
    chosen = choose_clusters(tables, hoped, budget, group)
    owner = _owners(tables, starts)
    raw, scanned = score_places(tables, owner, query, logits, chosen)
    places = Places(raw, scanned, starts, query.norm(dim=-1) * tables.noise())
    masses, _ = sum_clusters(tables, places, logits)
    total = masses.logsumexp(-1)
    hits = take_hits(tables, places, owner, total, budget, group)
    rest, squares = _estimate_rest(tables, places, logits, total, outline.firsts)
    num_scanned = (scanned * outline.block_tokens).sum()
    return Scan(*hits, rest, squares, num_scanned)


class _Outline(NamedTuple):
    """Where segments are; as tensors, which are made once, as bringing them there is a wait.

    Attributes
    ----------
    filling : Tensor, int16 [num_clusters]
        Places of filling before the first key of a cluster, at the end of the segment before.
    firsts : Tensor, int32 [num_segments + 1]
        First block of each segment, and the number of all blocks.
    block_tokens : Tensor, int32 [num_blocks]
        Places of each block that are no filling.
    """

    filling: Tensor
    firsts: Tensor
    block_tokens: Tensor


@functools.lru_cache(maxsize=8)
def _outline(sizes: Sizes, device: torch.device) -> _Outline:
    empty = torch.tensor([num_places(size) - size for size, _ in sizes], dtype=torch.int16)
    stops = [0, *accumulate(num_places(size) // BLOCK_PLACES for size, _ in sizes)]
    block_tokens = torch.full((stops[-1],), BLOCK_PLACES, dtype=torch.int32)
    block_tokens[torch.tensor(stops[1:]) - 1] -= empty
    ends = list(accumulate(num_clusters for _, num_clusters in sizes))
    filling = torch.zeros(ends[-1], dtype=torch.int16)
    filling[ends[:-1]] = empty[:-1]
    firsts = torch.tensor(stops, dtype=torch.int32)
    return _Outline(filling.to(device), firsts.to(device), block_tokens.to(device))


def _contiguous(tables: ScanTables) -> ScanTables:
    return ScanTables._make(x.contiguous() if isinstance(x, Tensor) else x for x in tables)


def _owners(tables: ScanTables, starts: Tensor) -> Tensor:
    """Return the cluster of each place, -1 for filling, as few bytes as will do."""
    num_heads, num_clusters = starts.shape
    size = tables.key_scale.shape[1]
    dtype = torch.int16 if num_clusters <= 1 << 15 else torch.int32
    owner = torch.full((num_heads, size), -1, dtype=dtype, device=starts.device)
    with on_device(owner):
        _own_places[(triton.cdiv(num_clusters, TILE_CLUSTERS), num_heads)](
            starts, tables.counts, owner, num_clusters, size, TILE=TILE_CLUSTERS, num_warps=4
        )
    return owner


def _estimate_rest(
    tables: ScanTables, places: Places, logits: Tensor, total: Tensor, firsts: Tensor
) -> tuple[Partial, Tensor]:
    """Return attention to what is not read, and its expected squared error."""
    masses, squares = sum_clusters(tables, places, logits, total)
    lse = masses.logsumexp(-1)
    level = lse.nan_to_num(neginf=0.0)
    # A scanned token stands for its cluster's mean and its own coded residual.
    weights = (masses - level.unsqueeze(-1)).exp() * tables.value_mean_scale.unsqueeze(1)
    out = weigh_rows(weights, tables.value_means)
    sums = sum_residuals(tables, places, level, firsts)
    return Partial(out + weigh_rows(sums, tables.basis.flatten(1, 2)), lse), squares
