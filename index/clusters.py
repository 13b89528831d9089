"""Clusters of a segment's keys, and attention estimated from their means.

RetroInfer's wave index (arXiv 2505.02922, section 4): centroids, counts and value sums per cluster;
clusters are fetched whole by the share of the centroid's softmax, and the rest are estimated as if
all their keys were the centroid. Here every cluster that is not read is estimated, not only the
next 23 %, and means are kept in eight bits.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from offload.index.base import (
    NO_TOKEN,
    Combine,
    Hits,
    KeyIndex,
    combine_group,
    require_finite,
)
from offload.index.kmeans import cluster_means, spherical_kmeans
from offload.index.rest import remaining
from offload.kernels.scan import Sizes, clusters_of_places, num_places
from offload.types import Partial

SEGMENT_TOKENS = 8192
"""Keys that are clustered together; a longer run is cut."""


@dataclass(frozen=True, slots=True)
class Clusters:
    """Clusters of consecutive segments.

    Attributes
    ----------
    centroids, value_means : Tensor, int8 [num_heads, num_clusters, dim]
    centroid_scale, value_scale : Tensor, bfloat16 [num_heads, num_clusters]
        Times these, the means of keys and values.
    counts : Tensor, int16 [num_heads, num_clusters]
    order : Tensor, int16 [num_heads, num_places]
        The tokens of each segment, counted from its first, sorted by cluster. A *place* is a
        position in this order; segments are filled up to a multiple of 16 places with -1.
    sizes : Sizes
    """

    centroids: Tensor
    centroid_scale: Tensor
    value_means: Tensor
    value_scale: Tensor
    counts: Tensor
    order: Tensor
    sizes: Sizes

    @property
    def num_tokens(self) -> int:
        """Tokens of all segments."""
        return sum(num_tokens for num_tokens, _ in self.sizes)

    def prefix(self, num_tokens: int) -> "Clusters":
        """Return the clusters of the first segments, which have so many tokens."""
        stops = list(accumulate(tokens for tokens, _ in self.sizes))
        sizes = self.sizes[: stops.index(num_tokens) + 1]
        num_clusters = sum(count for _, count in sizes)
        all_places = sum(num_places(tokens) for tokens, _ in sizes)
        cut = {
            name: tensor[:, : all_places if name == "order" else num_clusters]
            for name, tensor in self.tensors().items()
        }
        return Clusters(**cut, sizes=sizes)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {name: getattr(self, name) for name in _TENSORS}

    def key_means(self) -> Tensor:
        """Return the centroids, float32."""
        return self.centroids.float() * self.centroid_scale.float().unsqueeze(-1)

    def means_of_values(self) -> Tensor:
        """Return the value means, float32."""
        return self.value_means.float() * self.value_scale.float().unsqueeze(-1)

    def cluster_of_places(self) -> Tensor:
        """Return the cluster of each place, counted over all segments, int64; see there."""
        return clusters_of_places(self.counts, self.sizes)

    def tokens_at(self, places: Tensor) -> Tensor:
        """Return the tokens at places, counted over all segments; -1 for filling and for -1.

        Parameters
        ----------
        places : Tensor, int64 [num_heads, num_wanted]
        """
        lengths = [num_tokens for num_tokens, _ in self.sizes]
        stops = torch.tensor(list(accumulate(map(num_places, lengths))), device=places.device)
        first = torch.tensor([0, *accumulate(lengths)], device=places.device)
        order = self.order.gather(1, places.clamp_min(0))
        tokens = order + first[_rank(stops, places)]
        return tokens.masked_fill((order < 0) | (places < 0), NO_TOKEN)


def _rank(stops: Tensor, places: Tensor) -> Tensor:
    """Return how many stops are not behind each place."""
    if places.device.type != "cpu":
        return torch.searchsorted(stops, places, right=True)
    # torch uses its threads for this, which then spin on the cores that are needed next.
    return torch.from_numpy(np.searchsorted(stops.numpy(), places.numpy(), side="right"))


_TENSORS = tuple(field.name for field in fields(Clusters) if field.name != "sizes")


def build_clusters(keys: Tensor, values: Tensor, tokens_per_cluster: int) -> Clusters:
    """Cluster the keys of each segment.

    Parameters
    ----------
    keys : Tensor, shape (num_heads, num_tokens, key_dim)
    values : Tensor, shape (num_heads, num_tokens, value_dim)
    tokens_per_cluster : int
        On average.

    Raises
    ------
    ConfigError
        A key or value is not finite.
    """
    require_finite(keys, values)
    segments = zip(keys.split(SEGMENT_TOKENS, 1), values.split(SEGMENT_TOKENS, 1), strict=True)
    return join_clusters([cluster_segment(*segment, tokens_per_cluster) for segment in segments])


def join_clusters(parts: Sequence[Clusters]) -> Clusters:
    """Return the clusters of consecutive runs as one."""
    if len(parts) == 1:
        return parts[0]
    named = [part.tensors() for part in parts]
    joined = {name: torch.cat([tensors[name] for tensors in named], 1) for name in named[0]}
    return Clusters(**joined, sizes=tuple(size for part in parts for size in part.sizes))


def restore_clusters(tensors: Mapping[str, Tensor], sizes: Sequence[Sequence[int]]) -> Clusters:
    """Return the clusters whose tensors these are; others among them are ignored."""
    pairs = tuple((num_tokens, num_clusters) for num_tokens, num_clusters in sizes)
    return Clusters(**{name: tensors[name] for name in _TENSORS}, sizes=pairs)


def cluster_segment(keys: Tensor, values: Tensor, tokens_per_cluster: int) -> Clusters:
    """Cluster the keys of one segment, which are finite; see ``build_clusters``."""
    keys, values = keys.float(), values.float()
    num_tokens = keys.shape[1]
    num_clusters = max(1, num_tokens // tokens_per_cluster)
    assignment, centroids = spherical_kmeans(keys, num_clusters)
    means, counts = cluster_means(values, assignment, num_clusters)
    order = assignment.argsort(dim=1, stable=True).to(torch.int16)
    return Clusters(
        *to_int8(centroids),
        *to_int8(means),
        counts.to(torch.int16),
        pad(order, (0, num_places(num_tokens) - num_tokens), value=-1),
        ((num_tokens, num_clusters),),
    )


def to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows as int8 ``[..., dim]`` and the scale ``[...]`` that they are in, bfloat16."""
    # The scale is rounded by a 512th at most, and the largest entry must not need 128 of it.
    scale = (rows.abs().amax(-1) / 126.5).clamp_min(1e-30).to(torch.bfloat16)
    return (rows / scale.float().unsqueeze(-1)).round().clamp(-127, 127).to(torch.int8), scale


@dataclass(frozen=True, slots=True)
class ClusterIndex(KeyIndex):
    """Fetches whole clusters and estimates the others.

    Parameters
    ----------
    clusters : Clusters
    """

    tail_takes_values = True

    clusters: Clusters

    @classmethod
    def build(cls, keys: Tensor, values: Tensor, *, tokens_per_cluster: int = 16) -> Self:  # noqa: D102
        return cls(build_clusters(keys, values, tokens_per_cluster))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:  # noqa: D102
        return cls(join_clusters([part.clusters for part in parts]))

    def prefix(self, num_tokens: int) -> Self:  # noqa: D102
        return type(self)(self.clusters.prefix(num_tokens))

    @property
    def num_heads(self) -> int:  # noqa: D102
        return self.clusters.counts.shape[0]

    @property
    def num_tokens(self) -> int:  # noqa: D102
        return self.clusters.num_tokens

    def tensors(self) -> Mapping[str, Tensor]:  # noqa: D102
        return self.clusters.tensors()

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"sizes": self.clusters.sizes}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:  # noqa: D102
        return cls(restore_clusters(tensors, meta["sizes"]))

    def search(  # noqa: D102
        self, query: Tensor, budget: int, group: Combine = "max", past: Hits | None = None
    ) -> Hits:
        clusters = self.clusters
        logits = torch.bmm(query, clusters.key_means().transpose(1, 2))
        # A cluster without keys has the mean zero, and no claim to the logit of it.
        logits = logits.masked_fill(clusters.counts.eq(0).unsqueeze(1), -math.inf)
        shares = combine_group(logits, group).gather(1, clusters.cluster_of_places())
        shares = shares.masked_fill(clusters.order < 0, -math.inf)
        places = shares.topk(min(budget, self.num_tokens), dim=1).indices
        return Hits(
            clusters.tokens_at(places),
            clusters.centroids.numel() + 2 * clusters.centroid_scale.numel(),
            places,
        )

    def tail(self, query: Tensor, hits: Hits, have: Tensor, values: Tensor) -> Partial | None:  # noqa: D102
        return cluster_tail(self.clusters, query, hits, have, values)


def cluster_tail(
    clusters: Clusters, query: Tensor, hits: Hits, have: Tensor, values: Tensor
) -> Partial:
    """Estimate all tokens that were not read as copies of their cluster's means."""
    logits = torch.bmm(query, clusters.key_means().transpose(1, 2))
    places = hits.state
    assert isinstance(places, Tensor)
    group_of = clusters.cluster_of_places().gather(1, places)[:, : hits.ids.shape[1]]
    counts, means = remaining(
        clusters.counts, clusters.means_of_values(), group_of, hits, have, values
    )
    logits = logits + counts.log().unsqueeze(1)
    lse = logits.logsumexp(-1)
    weights = (logits - lse.nan_to_num(neginf=0.0).unsqueeze(-1)).exp()
    return Partial(torch.bmm(weights, means), lse)
