"""Scan clusters and codes of keys: which tokens a query needs, and an estimate of the rest.

Plain torch: the definition that faster scans are tested against. The index that the tables belong
to, and where the method comes from: ``index/residual.py``.
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from offload.kernels.codes import (
    BLOCK_PLACES,
    Codes,
    inner_products,
    level_norm,
    noise,
    rotation,
)
from offload.kernels.sign_planes import signs_at, unpack_signs
from offload.types import Partial

Combine = Literal["max", "sum"]
"""How the queries of a group agree on what to read."""

Sizes = tuple[tuple[int, int], ...]
"""Tokens and clusters of each segment."""

DEVIATIONS = 3.0
"""Of its keys above the mean that a cluster is judged by. With less, or without, keys that almost
all of the softmax is on are missed twice as often."""

LEAST_SPREAD = 1e-12


class ScanTables(NamedTuple):
    """What is scanned. A *place* is a token in the order of its cluster.

    Attributes
    ----------
    centroids : Tensor, int8 [num_heads, num_clusters, key_dim]
    centroid_scale : Tensor, bfloat16 [num_heads, num_clusters]
    value_means : Tensor, int8 [num_heads, num_clusters, value_dim]
    value_mean_scale : Tensor, bfloat16 [num_heads, num_clusters]
    counts : Tensor, int16 [num_heads, num_clusters]
        Keys of each cluster, which are at consecutive places.
    spread, radius : Tensor, bfloat16 [num_heads, num_clusters]
        Root mean square of what coded values miss, and of the residuals of the keys.
    key_bits : Tensor, uint8 [num_heads, num_places / 16, num_words, 16, 4]
    key_scale : Tensor, bfloat16 [num_heads, num_places]
        See ``Codes``.
    value_bits : Tensor, uint8 [num_heads, num_places / 16, 16, 4]
        See ``pack_signs``.
    value_scale : Tensor, bfloat16 [num_heads, num_places]
    basis : Tensor, float16 [num_heads, num_segments, 32, value_dim]
        Directions of the coded residuals of values.
    sizes : Sizes
        Tokens and clusters of each segment, whose places are filled up to a multiple of 16.
    num_bits : int
        Of a key's code, per dimension.
    share : float
        Of the tokens that are scanned, those of the best clusters.
    """

    centroids: Tensor
    centroid_scale: Tensor
    value_means: Tensor
    value_mean_scale: Tensor
    counts: Tensor
    spread: Tensor
    radius: Tensor
    key_bits: Tensor
    key_scale: Tensor
    value_bits: Tensor
    value_scale: Tensor
    basis: Tensor
    sizes: Sizes
    num_bits: int
    share: float

    @property
    def num_tokens(self) -> int:
        """Tokens of all segments."""
        return sum(num_tokens for num_tokens, _ in self.sizes)

    def wanted(self, budget: int) -> int:
        """Return how many tokens to scan, at least: several times what will be read."""
        return max(int(self.share * self.num_tokens), 4 * budget)

    def noise(self) -> float:
        """Return the deviation of an estimated logit, per unit of its scale and of the query."""
        dim = self.centroids.shape[2]
        return noise(self.num_bits, dim) * level_norm(self.num_bits, dim)


class Scan(NamedTuple):
    """What a scan found.

    Attributes
    ----------
    places : Tensor, int64 [num_heads, num_hits]
        The best first; -1 where a head has fewer.
    clusters : Tensor, int64 [num_heads, num_hits]
    logits : Tensor, shape (num_heads, num_queries, num_hits), float32
        Estimated for each query; ``-inf`` where there is no hit.
    rest : Partial
        Attention estimated over all other tokens, ``out`` [num_heads, num_queries, value_dim].
    squares : Tensor, shape (num_heads, num_queries), float32
        Sum of the squared errors that the other tokens are expected to bring, in units of the
        whole softmax.
    num_scanned : int or Tensor, int64 []
        Places, of all heads. A tensor where reading it waits for a device.
    """

    places: Tensor
    clusters: Tensor
    logits: Tensor
    rest: Partial
    squares: Tensor
    num_scanned: int | Tensor

    def lse(self) -> Tensor:
        """Return the log of the whole softmax, as estimated, ``[num_heads, num_queries]``."""
        return torch.logaddexp(self.rest.lse, self.logits.logsumexp(-1))


def scan(tables: ScanTables, query: Tensor, budget: int, group: Combine) -> Scan:
    """Find the best tokens and estimate the others.

    Parameters
    ----------
    tables : ScanTables
    query : Tensor, shape (num_heads, num_queries, key_dim), float32
        Scaled.
    budget : int
        Tokens per head, at most.
    group : {"max", "sum"}
        How the shares that queries give a token are combined.
    """
    own = clusters_of_places(tables.counts, tables.sizes)
    key_means = tables.centroids.float() * tables.centroid_scale.float().unsqueeze(-1)
    logits = torch.bmm(query, key_means.mT)
    scanned = _scanned(tables, own, query, logits, budget, group)
    raw, variance = _place_logits(tables, own, query, logits)
    raw = raw.masked_fill(~scanned.unsqueeze(1), -math.inf)
    # The mean of exp(x + noise) is exp(x + variance / 2). Half of that is taken out: tokens whose
    # noise was upward are mostly read, and those that are left err downward already.
    tokens = raw - variance / 4
    left = tables.counts - torch.zeros_like(tables.counts, dtype=torch.int64).scatter_add_(
        1, own, scanned.long()
    )
    others = logits + left.float().log().unsqueeze(1)
    total = torch.logaddexp(tokens.logsumexp(-1), others.logsumexp(-1))
    # Reading a token costs little, missing one that matters much: hope for two deviations.
    shares = combine_shares(raw + 2 * variance.sqrt() - total.unsqueeze(-1), group)
    scores = shares + tables.spread.float().clamp_min(LEAST_SPREAD).log().gather(1, own)
    best = scores.topk(min(budget, tables.num_tokens, scores.shape[1]), dim=1)
    found = best.values > -math.inf
    of_hits = best.indices.unsqueeze(1).expand(-1, query.shape[1], -1)
    rest_tokens = tokens.scatter(2, of_hits, -math.inf)
    rest, squares = _estimate_rest(tables, own, tokens, rest_tokens, others, left, total)
    return Scan(
        torch.where(found, best.indices, -1),
        own.gather(1, best.indices),
        tokens.gather(2, of_hits),
        rest,
        squares,
        int(scanned.sum()),
    )


def combine_shares(shares: Tensor, group: Combine) -> Tensor:
    """Return one log share per key for a group of queries, ``[num_heads, num_keys]``.

    Parameters
    ----------
    shares : Tensor, shape (num_heads, num_queries, num_keys)
        Log of what each query gives to each key.
    group : {"max", "sum"}
        The largest of them: what a single query needs is not outvoted. Or their sum: the keys are
        kept that weigh most in the group.
    """
    return shares.amax(1) if group == "max" else shares.logsumexp(1)


def _scanned(
    tables: ScanTables,
    own: Tensor,
    query: Tensor,
    logits: Tensor,
    budget: int,
    group: Combine,
) -> Tensor:
    """Return which places to scan: blocks that hold a key of one of the best clusters.

    A key that matters may differ much from its cluster: clusters count as if their keys had a logit
    of some deviations above that of the mean.
    """
    deviation = tables.radius.float().unsqueeze(1) * query.norm(dim=-1, keepdim=True)
    hoped = logits + tables.counts.float().log().unsqueeze(1)
    hoped = hoped + DEVIATIONS / math.sqrt(query.shape[-1]) * deviation
    shares = combine_shares(torch.log_softmax(hoped, -1), group)
    order = shares.argsort(dim=1, descending=True, stable=True)
    counts = tables.counts.long().gather(1, order)
    chosen = counts.cumsum(1) - counts < tables.wanted(budget)
    chosen = torch.zeros_like(chosen).scatter_(1, order, chosen)
    is_token = token_places(tables.sizes).to(own.device)
    touched = chosen.gather(1, own) & is_token
    blocks = touched.unflatten(1, (-1, BLOCK_PLACES)).any(-1, keepdim=True)
    scanned: Tensor = blocks.expand(-1, -1, BLOCK_PLACES).flatten(1) & is_token
    return scanned


def clusters_of_places(counts: Tensor, sizes: Sizes) -> Tensor:
    """Return the cluster of each place, counted over all segments; filling is in the last.

    Parameters
    ----------
    counts : Tensor, int16 [num_heads, num_clusters]
    sizes : Sizes

    Returns
    -------
    Tensor, int64 [num_heads, num_places]
    """
    stops, first = [], 0
    for size, own in zip(sizes, counts.split([count for _, count in sizes], 1), strict=True):
        stops.append(own.cumsum(1) + first)
        first += num_places(size[0])
        stops[-1][:, -1] = first
    places = torch.arange(first, device=counts.device).expand(len(counts), -1)
    return torch.searchsorted(torch.cat(stops, 1), places.contiguous(), right=True)


def num_places(num_tokens: int) -> int:
    """Return the places of a segment of so many tokens."""
    return -(-num_tokens // BLOCK_PLACES) * BLOCK_PLACES


def token_places(sizes: Sizes) -> Tensor:
    """Return which places hold a token and are no filling, bool ``[num_places]``."""
    parts = []
    for num_tokens, _ in sizes:
        parts.append(torch.arange(num_places(num_tokens)) < num_tokens)
    return torch.cat(parts)


def _place_logits(
    tables: ScanTables, own: Tensor, query: Tensor, logits: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the estimated logit of every place, and the variance of that."""
    turned = query @ rotation(query.shape[-1]).to(query.device)
    codes = Codes(tables.key_bits, tables.key_scale)
    residual = inner_products(turned, codes, tables.num_bits)
    deviation = tables.noise() * tables.key_scale.float().abs()
    variance = (query.norm(dim=-1).unsqueeze(-1) * deviation.unsqueeze(1)).square()
    of_cluster = logits.gather(2, own.unsqueeze(1).expand(-1, query.shape[1], -1))
    return of_cluster + residual, variance


def _estimate_rest(
    tables: ScanTables,
    own: Tensor,
    tokens: Tensor,
    rest_tokens: Tensor,
    others: Tensor,
    left: Tensor,
    total: Tensor,
) -> tuple[Partial, Tensor]:
    """Return attention to what is not read, and its expected squared error."""
    lse = torch.logaddexp(rest_tokens.logsumexp(-1), others.logsumexp(-1))
    peak = lse.nan_to_num(neginf=0.0).unsqueeze(-1)
    weights, of_clusters = (rest_tokens - peak).exp(), (others - peak).exp()
    places = own.unsqueeze(1).expand_as(tokens)
    means = tables.value_means.float() * tables.value_mean_scale.float().unsqueeze(-1)
    # A scanned token stands for its cluster's mean and its own coded residual.
    out = torch.bmm(of_clusters.scatter_add(2, places, weights), means)
    out = out + _sum_residuals(tables, weights)
    spread = tables.spread.float()
    scale = (peak - total.unsqueeze(-1)).exp()
    # Errors of single tokens are independent, so their squares add up.
    single = (weights * scale * spread.gather(1, own).unsqueeze(1)).square().sum(-1)
    shared = (of_clusters * scale * spread.unsqueeze(1)).square() / left.clamp_min(1).unsqueeze(1)
    return Partial(out, lse), single + shared.sum(-1)


def _sum_residuals(tables: ScanTables, weights: Tensor) -> Tensor:
    """Return the weighted sum of the coded residuals of the values of all places."""
    along = unpack_signs(tables.value_bits) * tables.value_scale.float().unsqueeze(-1)
    lengths = [num_places(num_tokens) for num_tokens, _ in tables.sizes]
    pairs = zip(weights.split(lengths, 2), along.split(lengths, 1), strict=True)
    sums = torch.cat([torch.bmm(weight, rows) for weight, rows in pairs], 2)
    return sums @ tables.basis.float().flatten(1, 2)


def output_length(tables: ScanTables, found: Scan) -> Tensor:
    """Return how long the output is estimated to be, ``[num_heads, num_queries]``.

    Hits count as the means of their clusters.
    """
    lse = found.lse().unsqueeze(-1)
    clusters = found.clusters.unsqueeze(-1)
    means = tables.value_means.gather(1, clusters.expand(-1, -1, tables.value_means.shape[2]))
    means = means * tables.value_mean_scale.gather(1, found.clusters).float().unsqueeze(-1)
    hits = torch.bmm((found.logits - lse).exp(), means)
    rest = found.rest.out * (found.rest.lse.unsqueeze(-1) - lse).exp()
    length: Tensor = (hits + rest).norm(dim=-1)
    return length


def estimate_hits(tables: ScanTables, found: Scan, missing: Tensor) -> Partial:
    """Return attention estimated over some of the hits, which were not read after all.

    Parameters
    ----------
    tables : ScanTables
    found : Scan
    missing : Tensor, bool [num_heads, num_hits]
        Which of them.
    """
    logits = found.logits.masked_fill(~missing.unsqueeze(1), -math.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.nan_to_num(neginf=0.0).unsqueeze(-1)).exp()
    heads, hits = missing.nonzero(as_tuple=True)
    places, clusters = found.places[heads, hits], found.clusters[heads, hits]
    own_weights = weights[heads, :, hits]
    means = tables.value_means[heads, clusters].float()
    means = means * tables.value_mean_scale[heads, clusters].float().unsqueeze(-1)
    out = torch.zeros_like(found.rest.out)
    out.index_add_(0, heads, own_weights.unsqueeze(-1) * means.unsqueeze(1))
    starts = torch.tensor([num_places(num_tokens) for num_tokens, _ in tables.sizes])
    segment = torch.searchsorted(starts.cumsum(0).to(places.device), places, right=True)
    num_heads, num_segments = tables.basis.shape[:2]
    signs = signs_at(
        tables.value_bits[heads, places.div(BLOCK_PLACES, rounding_mode="floor")],
        places.remainder(BLOCK_PLACES),
    )
    along = own_weights * tables.value_scale[heads, places].float().unsqueeze(-1)
    sums = out.new_zeros(num_heads * num_segments, out.shape[1], signs.shape[1])
    sums.index_add_(0, heads * num_segments + segment, along.unsqueeze(-1) * signs.unsqueeze(1))
    basis = tables.basis.float().flatten(0, 1)
    residual = torch.bmm(sums, basis).unflatten(0, (num_heads, num_segments)).sum(1)
    return Partial(out + residual, lse)
