"""Spherical k-means within a segment, batched over heads."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

_BLOCK_TOKENS = 1024
"""Keys that are compared with all centroids at once: few enough for the scores to stay in cache."""


def spherical_kmeans(
    keys: Tensor, num_clusters: int, num_iterations: int = 3, sample_step: int = 4
) -> tuple[Tensor, Tensor]:
    """Group keys by direction.

    Centroids start at evenly spaced keys, which costs nothing and is the same every time; keys go
    to the centroid with the largest cosine; a centroid is the mean of its keys, lengths included.
    All but the last round look at a sample of the keys: neighbours are alike. A centroid that loses
    all keys stays where it is. As in RetroInfer (section 4.1), but within a
    segment only, so that a segment never changes once it is built.

    Parameters
    ----------
    keys : Tensor, shape (num_heads, num_tokens, key_dim), float32
    num_clusters : int
        At most ``num_tokens``.
    num_iterations : int
    sample_step : int
        Every how many keys are in the sample.

    Returns
    -------
    assignment : Tensor, int64 [num_heads, num_tokens]
    centroids : Tensor, shape (num_heads, num_clusters, key_dim)
        Means of the keys assigned to each; zero where there are none.
    """
    num_tokens = keys.shape[1]
    starts = torch.arange(num_clusters, device=keys.device) * num_tokens // num_clusters
    centroids = keys[:, starts]
    sample = keys[:, ::sample_step].contiguous()
    for _ in range(num_iterations):
        means, counts = cluster_means(sample, _nearest(sample, centroids), num_clusters)
        centroids = torch.where(counts.unsqueeze(-1) > 0, means, centroids)
    assignment = _nearest(keys, centroids)
    return assignment, cluster_means(keys, assignment, num_clusters)[0]


def cluster_means(rows: Tensor, assignment: Tensor, num_clusters: int) -> tuple[Tensor, Tensor]:
    """Return the mean of the rows of each cluster, and how many there are.

    Parameters
    ----------
    rows : Tensor, shape (num_heads, num_tokens, dim)
    assignment : Tensor, int64 [num_heads, num_tokens]
    num_clusters : int

    Returns
    -------
    means : Tensor, shape (num_heads, num_clusters, dim)
        Zero where a cluster is empty.
    counts : Tensor, float [num_heads, num_clusters]
    """
    places = _places(assignment, num_clusters)
    flat = rows.flatten(0, 1)
    shape = rows.shape[0], num_clusters
    sums = flat.new_zeros(shape[0] * num_clusters, rows.shape[2]).index_add_(0, places, flat)
    counts = torch.bincount(places, minlength=len(sums)).to(rows.dtype)
    means = sums / counts.clamp_min(1).unsqueeze(-1)
    return means.unflatten(0, shape), counts.unflatten(0, shape)


def rows_of_clusters(means: Tensor, assignment: Tensor) -> Tensor:
    """Return the row of each token's cluster.

    Parameters
    ----------
    means : Tensor, shape (num_heads, num_clusters, dim)
    assignment : Tensor, int64 [num_heads, num_tokens]

    Returns
    -------
    Tensor, shape (num_heads, num_tokens, dim)
    """
    rows = means.flatten(0, 1).index_select(0, _places(assignment, means.shape[1]))
    return rows.view(*assignment.shape, -1)


def _places(assignment: Tensor, num_clusters: int) -> Tensor:
    """Return clusters numbered through all heads: torch moves rows faster in one dimension."""
    heads = torch.arange(len(assignment), device=assignment.device)
    return (assignment + num_clusters * heads.unsqueeze(1)).flatten()


def _nearest(keys: Tensor, centroids: Tensor) -> Tensor:
    """Return the centroid with the largest cosine; the length of a key does not matter to that."""
    directions = normalize(centroids, dim=-1).mT
    blocks = [_largest_(torch.bmm(block, directions)) for block in keys.split(_BLOCK_TOKENS, 1)]
    return torch.cat(blocks, 1)


def _largest_(scores: Tensor) -> Tensor:
    """Return where the largest score of each row is; overwrites the scores.

    ``argmax`` takes as long as the products do, ``amax`` a tenth of that: so the lowest bits of
    each score become its place, and those of the largest tell which it was. Scores that differ in
    these bits only, by 2**-15 of their size with 256 places, count as equal.
    """
    num_places = scores.shape[-1]
    mask = (1 << (num_places - 1).bit_length()) - 1
    places = torch.arange(num_places, dtype=torch.int32, device=scores.device)
    scores.view(torch.int32).bitwise_and_(~mask).bitwise_or_(places)
    largest: Tensor = scores.amax(-1).view(torch.int32) & mask
    return largest.long()
