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
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from offload.index.base import NO_TOKEN, Hits, KeyIndex
from offload.index.clusters import (
    SEGMENT_TOKENS,
    Clusters,
    build_clusters,
    join_clusters,
)
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
    def build(cls, keys: Tensor, values: Tensor, **options: object) -> Self:  # noqa: D102
        settings = Settings(**options)  # type: ignore[arg-type]
        clusters = build_clusters(keys, values, settings.tokens_per_cluster)
        number = clusters.cluster_of()
        key_residuals = keys.float() - _rows(clusters.key_means(), number)
        value_residuals = values.float() - _rows(clusters.means_of_values(), number)
        turn = rotation(keys.shape[-1]).to(keys.device)
        bases, codes = [], []
        for start in range(0, keys.shape[1], SEGMENT_TOKENS):
            part = value_residuals[:, start : start + SEGMENT_TOKENS]
            basis = _widest(part)
            bases.append(basis.to(torch.float16))
            codes.append(encode(torch.bmm(part, basis.transpose(1, 2)), 1, unbiased=False))
        value_codes = _join_codes(codes)
        stacked = torch.stack(bases, 1)
        index = cls(
            settings,
            clusters,
            encode(key_residuals @ turn, settings.num_bits, unbiased=True),
            value_codes,
            stacked,
            torch.zeros_like(clusters.centroid_scale),
        )
        missed = (value_residuals - index._value_residuals()).square().sum(-1)
        counts = clusters.counts.float()
        total = torch.zeros_like(counts).scatter_add_(1, number, missed)
        index.spread.copy_((total / counts.clamp_min(1)).sqrt())
        return index

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:  # noqa: D102
        if len(parts) == 1:
            return parts[0]
        return cls(
            parts[0].settings,
            join_clusters([part.clusters for part in parts]),
            _join_codes([part.keys for part in parts]),
            _join_codes([part.values for part in parts]),
            torch.cat([part.basis for part in parts], 1),
            torch.cat([part.spread for part in parts], 1),
        )

    @property
    def num_heads(self) -> int:  # type: ignore[override]
        """KV heads."""
        return self.clusters.counts.shape[0]

    @property
    def num_tokens(self) -> int:  # type: ignore[override]
        """Tokens per head."""
        return self.clusters.assignment.shape[1]

    @property
    def num_bytes(self) -> int:  # noqa: D102
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

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

    def search(self, query: Tensor, budget: int) -> Hits:  # noqa: D102
        estimate = self._estimate(query, budget)
        shares = (estimate.logits - estimate.lse.unsqueeze(-1)).exp().amax(1)
        number = self.clusters.cluster_of().gather(1, estimate.tokens)
        missed = self.spread.float().gather(1, number)
        scores = torch.where(estimate.valid, shares * missed.clamp_min(1e-12), -1.0)
        best = scores.topk(min(budget, scores.shape[1]), dim=1)
        ids = estimate.tokens.gather(1, best.indices)
        scanned = estimate.valid.sum() * (self.keys.bits.shape[-1] + 2)
        means = self.clusters.centroids.numel() + 2 * self.clusters.centroid_scale.numel()
        return Hits(torch.where(best.values >= 0, ids, NO_TOKEN), int(scanned) + means, estimate)

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
        residuals = self._value_residuals().gather(
            1, estimate.tokens.unsqueeze(-1).expand(-1, -1, out.shape[-1])
        )
        return Partial(out + torch.bmm(token_weights, residuals), lse)

    def _estimate(self, query: Tensor, budget: int) -> "_Estimate":
        """Score clusters, then the tokens of the best of them: more of these than are wanted."""
        clusters = self.clusters
        logits = torch.bmm(query, clusters.key_means().transpose(1, 2))
        masses = logits + clusters.counts.float().log().unsqueeze(1)
        lse = masses.logsumexp(-1, keepdim=True)
        order = (masses - lse).exp().amax(1).argsort(1, descending=True)
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
        per_token = per_token + residual - variance / 2
        per_token = per_token.masked_fill(~valid.unsqueeze(1), -math.inf)
        others = masses.masked_fill(scanned.unsqueeze(1), -math.inf)
        total = torch.logaddexp(per_token.logsumexp(-1), others.logsumexp(-1))
        return _Estimate(tokens, valid, per_token, others, total)

    def _value_residuals(self) -> Tensor:
        """Return what is known of the value residuals, ``[num_heads, num_tokens, value_dim]``."""
        along = decode(self.values, 1, self.basis.shape[2])
        parts = along.split([tokens for tokens, _ in self.clusters.sizes], 1)
        bases = self.basis.float().unbind(1)
        return torch.cat([torch.bmm(a, b) for a, b in zip(parts, bases, strict=True)], 1)


@dataclass(frozen=True, slots=True)
class _Estimate:
    """Attention estimated for all tokens.

    Attributes
    ----------
    tokens : Tensor, int64 [num_heads, num_scanned]
    valid : Tensor, bool, likewise
    logits : Tensor, shape (num_heads, num_queries, num_scanned)
        ``-inf`` where not valid.
    others : Tensor, shape (num_heads, num_queries, num_clusters)
        Log mass of each cluster that was not scanned; ``-inf`` for the others.
    lse : Tensor, shape (num_heads, num_queries)
    """

    tokens: Tensor
    valid: Tensor
    logits: Tensor
    others: Tensor
    lse: Tensor


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
