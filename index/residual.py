"""Clusters, and codes of what each key and value differs from its cluster: scores per token.

The logit of a key is that of its centroid plus the coded residual's (an IVF-RaBitQ with short
lists), so a few bytes per key say which tokens matter, and only those are read. Everything else is
estimated: tokens of clusters that were scanned with a weight and a value of their own, the other
clusters from their means. From RetroInfer (clusters, estimation zone), ParisKV (codes) and RaBitQ
(estimator); ours are the two together, residual codes instead of codes of whole keys, the
correction for the noise of the estimate inside the exponential, and coded value residuals.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from offload.index.base import NO_TOKEN, Hits, KeyIndex, agreed, require_finite
from offload.index.clusters import (
    SEGMENT_TOKENS,
    Clusters,
    cluster_segment,
    join_clusters,
    restore_clusters,
    to_int8,
)
from offload.index.kmeans import cluster_means
from offload.kernels.codes import (
    Codes,
    decode,
    encode,
    inner_products,
    level_norm,
    noise,
    rotation,
)
from offload.types import Partial

VALUE_DIMS = 32
"""Directions in which value residuals are coded: those that vary most in the segment."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How an index is built and searched.

    Attributes
    ----------
    num_bits : {1, 2}
        Per dimension of a key's residual.
    tokens_per_cluster : int
    scan : float
        Share of the tokens whose codes a search reads: those of the best clusters.
    """

    num_bits: int = 2
    tokens_per_cluster: int = 32
    scan: float = 0.4


@dataclass(frozen=True, slots=True)
class ResidualIndex(KeyIndex):
    """Token scores from clusters and residual codes, and an estimate of all that is not read.

    Attributes
    ----------
    settings : Settings
    clusters : Clusters
    keys : Codes
        Of the rotated residuals of the keys.
    values : Codes
        Of the residuals of the values, one bit in each of ``VALUE_DIMS`` directions.
    basis : Tensor, float16 [num_heads, num_segments, VALUE_DIMS, value_dim]
        These directions, orthonormal.
    spread : Tensor, float16 [num_heads, num_clusters]
        Root mean square of what the coded values miss, in each cluster.
    """

    settings: Settings
    clusters: Clusters
    keys: Codes
    values: Codes
    basis: Tensor
    spread: Tensor

    @classmethod
    def build(cls, keys: Tensor, values: Tensor, **options: Any) -> Self:  # noqa: D102
        settings = Settings(**options)
        require_finite(keys, values)
        segments = zip(keys.split(SEGMENT_TOKENS, 1), values.split(SEGMENT_TOKENS, 1), strict=True)
        return cls.join([cls._build_segment(*segment, settings) for segment in segments])

    @classmethod
    def _build_segment(cls, keys: Tensor, values: Tensor, settings: Settings) -> Self:
        clusters = cluster_segment(keys, values, settings.tokens_per_cluster)
        number = clusters.cluster_of()
        residuals = keys.float() - _rows(clusters.key_means(), number)
        turned = residuals @ rotation(keys.shape[-1]).to(keys.device)
        means = clusters.means_of_values()
        residuals = values.float() - _rows(means, number)
        basis = _widest(residuals).to(torch.float16)
        codes = encode(torch.bmm(residuals, basis.float().mT), 1, unbiased=False)
        coded = torch.bmm(decode(codes, 1, basis.shape[1]), basis.float())
        # Coded residuals do not sum to zero as true ones do; the means make up for it, so that a
        # cluster whose tokens all weigh the same is estimated exactly.
        means = means - cluster_means(coded, number, means.shape[1])[0]
        narrow, scale = to_int8(means)
        clusters = replace(clusters, value_means=narrow, value_scale=scale)
        missed = values.float() - _rows(clusters.means_of_values(), number) - coded
        squares = missed.square().sum(-1, keepdim=True)
        return cls(
            settings,
            clusters,
            encode(turned, settings.num_bits, unbiased=True),
            codes,
            basis.unsqueeze(1),
            cluster_means(squares, number, means.shape[1])[0].squeeze(-1).sqrt().half(),
        )

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:  # noqa: D102
        if len(parts) == 1:
            return parts[0]
        return cls(
            agreed([part.settings for part in parts]),
            join_clusters([part.clusters for part in parts]),
            _join_codes([part.keys for part in parts]),
            _join_codes([part.values for part in parts]),
            torch.cat([part.basis for part in parts], 1),
            torch.cat([part.spread for part in parts], 1),
        )

    @property
    def num_heads(self) -> int:  # noqa: D102
        return self.clusters.counts.shape[0]

    @property
    def num_tokens(self) -> int:  # noqa: D102
        return self.clusters.assignment.shape[1]

    def tensors(self) -> Mapping[str, Tensor]:  # noqa: D102
        return {
            **self.clusters.tensors(),
            "key_bits": self.keys.bits,
            "key_scale": self.keys.scale,
            "value_bits": self.values.bits,
            "value_scale_code": self.values.scale,
            "basis": self.basis,
            "spread": self.spread,
        }

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"settings": asdict(self.settings), "sizes": self.clusters.sizes}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:  # noqa: D102
        return cls(
            Settings(**meta["settings"]),
            restore_clusters(tensors, meta["sizes"]),
            Codes(tensors["key_bits"], tensors["key_scale"]),
            Codes(tensors["value_bits"], tensors["value_scale_code"]),
            tensors["basis"],
            tensors["spread"],
        )

    def search(self, query: Tensor, budget: int) -> Hits:  # noqa: D102
        estimate = self._estimate(query, budget)
        number = self.clusters.cluster_of().gather(1, estimate.tokens)
        missed = self.spread.float().gather(1, number).clamp_min(1e-12)
        scores = torch.where(estimate.valid, estimate.shares + missed.log(), -math.inf)
        best = scores.topk(min(budget, scores.shape[1]), dim=1)
        ids = estimate.tokens.gather(1, best.indices)
        scanned = estimate.valid.sum() * (self.keys.bits.shape[-1] + 2)
        means = self.clusters.centroids.numel() + 2 * self.clusters.centroid_scale.numel()
        return Hits(
            torch.where(best.values > -math.inf, ids, NO_TOKEN), int(scanned) + means, estimate
        )

    def tail(self, query: Tensor, hits: Hits, have: Tensor, values: Tensor) -> Partial | None:  # noqa: D102
        estimate = hits.state
        assert isinstance(estimate, _Estimate)
        read = torch.zeros(
            self.num_heads, self.num_tokens + 1, dtype=torch.bool, device=query.device
        )
        places = torch.where(have & hits.found, hits.ids, self.num_tokens)
        read.scatter_(1, places, value=True)
        left = estimate.valid & ~read[:, :-1].gather(1, estimate.tokens)
        tokens = estimate.logits.masked_fill(~left.unsqueeze(1), -math.inf)
        lse = torch.logaddexp(tokens.logsumexp(-1), estimate.others.logsumexp(-1))
        peak = lse.nan_to_num(neginf=0.0).unsqueeze(-1)
        token_weights, weights = (tokens - peak).exp(), (estimate.others - peak).exp()
        number = self.clusters.cluster_of().gather(1, estimate.tokens)
        # A scanned token stands for its cluster's mean and its own coded residual.
        weights = weights.scatter_add(
            2, number.unsqueeze(1).expand_as(token_weights), token_weights
        )
        out = torch.bmm(weights, self.clusters.means_of_values())
        return Partial(out + self._coded_values(estimate.tokens, token_weights), lse)

    def _estimate(self, query: Tensor, budget: int) -> "_Estimate":
        """Score clusters, then the tokens of the best of them: more of these than are wanted."""
        clusters = self.clusters
        logits = torch.bmm(query, clusters.key_means().transpose(1, 2))
        masses = logits + clusters.counts.float().log().unsqueeze(1)
        lse = masses.logsumexp(-1, keepdim=True)
        order = (masses - lse).amax(1).argsort(1, descending=True)
        counts = clusters.counts.long().gather(1, order)
        wanted = max(int(self.settings.scan * self.num_tokens), 2 * budget)
        chosen = counts.cumsum(1) - counts < wanted
        scanned = torch.zeros_like(chosen).scatter_(1, order, chosen)
        number = clusters.cluster_of()
        inside = scanned.gather(1, number)
        longest = int(inside.sum(1).max())
        tokens = inside.int().sort(dim=1, descending=True, stable=True).indices[:, :longest]
        valid = inside.gather(1, tokens)
        own = number.gather(1, tokens)
        num_bits, dim = self.settings.num_bits, query.shape[-1]
        turned = query @ rotation(dim).to(query.device)
        bits = self.keys.bits.gather(
            1, tokens.unsqueeze(-1).expand(-1, -1, self.keys.bits.shape[-1])
        )
        scale = self.keys.scale.gather(1, tokens)
        residual = inner_products(turned, Codes(bits, scale), num_bits)
        deviation = noise(num_bits, dim) * level_norm(num_bits, dim) * scale.float().abs()
        variance = (query.norm(dim=-1).unsqueeze(-1) * deviation.unsqueeze(1)).square()
        per_token = logits.gather(2, own.unsqueeze(1).expand(-1, logits.shape[1], -1))
        # The mean of exp(x + noise) is exp(x + variance / 2): take that out again.
        raw = (per_token + residual).masked_fill(~valid.unsqueeze(1), -math.inf)
        per_token = raw - variance / 2
        others = masses.masked_fill(scanned.unsqueeze(1), -math.inf)
        total = torch.logaddexp(per_token.logsumexp(-1), others.logsumexp(-1))
        # Reading a token costs little, missing one that matters much: hope for two deviations.
        shares = (raw + 2 * variance.sqrt() - total.unsqueeze(-1)).amax(1)
        return _Estimate(tokens, valid, shares, per_token, others)

    def _coded_values(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of what is known of the value residuals of some tokens."""
        heads, queries, _ = weights.shape
        everywhere = weights.new_zeros(heads, queries, self.num_tokens)
        everywhere.scatter_(2, tokens.unsqueeze(1).expand_as(weights), weights)
        lengths = [num_tokens for num_tokens, _ in self.clusters.sizes]
        along = decode(self.values, 1, self.basis.shape[2]).split(lengths, 1)
        sums = [torch.bmm(*pair) for pair in zip(everywhere.split(lengths, 2), along, strict=True)]
        return torch.cat(sums, 2) @ self.basis.float().flatten(1, 2)


@dataclass(frozen=True, slots=True)
class _Estimate:
    """Attention estimated for all tokens.

    Attributes
    ----------
    tokens : Tensor, int64 [num_heads, num_scanned]
    valid : Tensor, bool, likewise
    shares : Tensor, shape (num_heads, num_scanned)
        Log of the largest share of the softmax that any query may give a token.
    logits : Tensor, shape (num_heads, num_queries, num_scanned)
        ``-inf`` where not valid.
    others : Tensor, shape (num_heads, num_queries, num_clusters)
        Log mass of each cluster that was not scanned; ``-inf`` for the others.
    """

    tokens: Tensor
    valid: Tensor
    shares: Tensor
    logits: Tensor
    others: Tensor


def _rows(means: Tensor, number: Tensor) -> Tensor:
    return means.gather(1, number.unsqueeze(-1).expand(-1, -1, means.shape[-1]))


def _widest(residuals: Tensor) -> Tensor:
    """Return the directions in which residuals vary most, mixed at random so that all matter."""
    covariance = torch.bmm(residuals.transpose(1, 2), residuals)
    dims = min(VALUE_DIMS, residuals.shape[-1])
    directions: Tensor = torch.linalg.eigh(covariance)[1][..., -dims:].transpose(1, 2)
    return rotation(dims).to(residuals.device) @ directions


def _join_codes(parts: Sequence[Codes]) -> Codes:
    return Codes(torch.cat([p.bits for p in parts], 1), torch.cat([p.scale for p in parts], 1))
