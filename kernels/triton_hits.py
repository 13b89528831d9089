"""The best places of a scan, taken out of what is left to be estimated.

The definition: ``kernels.scan``. Every place gets one score for all queries of its head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from offload.kernels.scan import LEAST_SPREAD, Combine, ScanTables
from offload.kernels.triton_launch import on_device
from offload.kernels.triton_sums import Places

_TILE_PLACES = 512
_TILE_HITS = 128
_LEAST_SPREAD = tl.constexpr(LEAST_SPREAD)


@triton.jit
def _rank_places(
    raw: tl.tensor,
    scanned: tl.tensor,
    owner: tl.tensor,
    key_scale: tl.tensor,
    spread: tl.tensor,
    noise: tl.tensor,
    total: tl.tensor,
    scores: tl.tensor,
    num_queries: tl.tensor,
    num_clusters: tl.tensor,
    num_places: tl.tensor,
    LARGEST: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    head = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * TILE + tl.arange(0, TILE)
    is_place = place < num_places
    flags = scanned + head * (num_places // 16) + place // 16
    has_block = tl.load(flags, mask=is_place, other=0) > 0
    cluster = tl.load(owner + head * num_places + place, mask=has_block, other=-1).to(tl.int64)
    is_scanned = cluster >= 0
    scale = tl.load(key_scale + head * num_places + place, mask=is_scanned, other=0.0)
    scale = tl.abs(scale.to(tl.float32))
    best = tl.full([TILE], float("-inf"), tl.float32)
    mass = tl.zeros([TILE], tl.float32)
    for query in tl.range(0, num_queries):
        row = head * num_queries + query
        logit = tl.load(raw + row * num_places + place, mask=is_scanned, other=float("-inf"))
        share = logit + 2.0 * tl.load(noise + row) * scale - tl.load(total + row)
        top = tl.maximum(best, share)
        if not LARGEST:
            level = tl.where(top == float("-inf"), 0.0, top)
            mass = mass * tl.exp(best - level) + tl.exp(share - level)
        best = top
    if not LARGEST:
        best += tl.log(tl.maximum(mass, 1.0))
    missed = tl.load(spread + head * num_clusters + cluster, mask=is_scanned, other=1.0)
    best += tl.log(tl.maximum(missed.to(tl.float32), _LEAST_SPREAD))
    tl.store(scores + head * num_places + place, best, mask=is_place)


@triton.jit
def _take_hits(
    best: tl.tensor,
    scores: tl.tensor,
    raw: tl.tensor,
    owner: tl.tensor,
    key_scale: tl.tensor,
    noise: tl.tensor,
    places: tl.tensor,
    clusters: tl.tensor,
    logits: tl.tensor,
    num_queries: tl.tensor,
    num_hits: tl.tensor,
    num_places: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    head = tl.program_id(1).to(tl.int64)
    hit = tl.program_id(0) * TILE + tl.arange(0, TILE)
    has_hit = hit < num_hits
    place = tl.load(best + head * num_hits + hit, mask=has_hit, other=0)
    score = tl.load(scores + head * num_hits + hit, mask=has_hit, other=float("-inf"))
    is_found = score > float("-inf")
    cluster = tl.load(owner + head * num_places + place, mask=is_found, other=0).to(tl.int64)
    tl.store(places + head * num_hits + hit, tl.where(is_found, place, -1), mask=has_hit)
    tl.store(clusters + head * num_hits + hit, cluster, mask=has_hit)
    scale = tl.load(key_scale + head * num_places + place, mask=is_found, other=0.0).to(tl.float32)
    for query in tl.range(0, num_queries):
        row = head * num_queries + query
        own = raw + row * num_places + place
        deviation = tl.load(noise + row) * scale
        logit = tl.load(own, mask=is_found, other=float("-inf")) - deviation * deviation / 4
        tl.store(logits + row * num_hits + hit, logit, mask=has_hit)
        tl.store(own, float("-inf"), mask=is_found)


def take_hits(
    tables: ScanTables, places: Places, owner: Tensor, total: Tensor, budget: int, group: Combine
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best places, and leave the raw logits of all others.

    Parameters
    ----------
    tables : ScanTables
    places : Places
        Raw logits of hits are ``-inf`` afterwards.
    owner : Tensor, int16 or int32 [num_heads, num_places]
        Cluster of each place; -1 for filling.
    total : Tensor, shape (num_heads, num_queries), float32
        Log of the whole softmax.
    budget : int
    group : {"max", "sum"}

    Returns
    -------
    places, clusters, logits : Tensor
        See ``Scan``. The cluster is 0 where there is no hit.
    """
    num_heads, num_queries, size = places.raw.shape
    scores = total.new_empty(num_heads, size)
    with on_device(scores):
        _rank_places[(triton.cdiv(size, _TILE_PLACES), num_heads)](
            places.raw,
            places.scanned,
            owner,
            tables.key_scale,
            tables.spread,
            places.noise,
            total,
            scores,
            num_queries,
            tables.counts.shape[1],
            size,
            LARGEST=group == "max",
            TILE=_TILE_PLACES,
            num_warps=4,
        )
        num_hits = min(budget, tables.num_tokens)
        best = scores.topk(num_hits, dim=1)
        found, clusters = torch.empty_like(best.indices), torch.empty_like(best.indices)
        logits = total.new_empty(num_heads, num_queries, num_hits)
        if num_hits:
            _take_hits[(triton.cdiv(num_hits, _TILE_HITS), num_heads)](
                best.indices,
                best.values,
                places.raw,
                owner,
                tables.key_scale,
                places.noise,
                found,
                clusters,
                logits,
                num_queries,
                num_hits,
                size,
                TILE=_TILE_HITS,
                num_warps=4,
            )
    return found, clusters, logits
