"""Spherical k-means within a segment, batched over heads."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def spherical_kmeans(
    keys: Tensor, num_clusters: int, num_iterations: int = 5, sample_step: int = 4
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
    directions = normalize(keys, dim=-1)
    sample, seen = keys[:, ::sample_step], directions[:, ::sample_step]
    for _ in range(num_iterations):
        means, counts = cluster_means(sample, _nearest(seen, centroids), num_clusters)
        centroids = torch.where(counts.unsqueeze(-1) > 0, means, centroids)
    assignment = _nearest(directions, centroids)
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
    sums = rows.new_zeros(rows.shape[0], num_clusters, rows.shape[2])
    sums.scatter_add_(1, assignment.unsqueeze(-1).expand_as(rows), rows)
    counts = rows.new_zeros(rows.shape[0], num_clusters)
    counts.scatter_add_(1, assignment, torch.ones_like(assignment, dtype=rows.dtype))
    return sums / counts.clamp_min(1).unsqueeze(-1), counts


def _nearest(directions: Tensor, centroids: Tensor) -> Tensor:
    return torch.bmm(directions, normalize(centroids, dim=-1).transpose(1, 2)).argmax(-1)
