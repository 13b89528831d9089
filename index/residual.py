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
from torch.nn.functional import pad

from offload.index.base import (
    NO_TOKEN,
    Combine,
    Hits,
    KeyIndex,
    agreed,
    combine_group,
    combine_shares,
    require_finite,
)
from offload.index.clusters import (
    SEGMENT_TOKENS,
    Clusters,
    cluster_segment,
    join_clusters,
    restore_clusters,
    to_int8,
)
from offload.index.kmeans import cluster_means, rows_of_clusters
from offload.index.value_codes import (
    ValueCodes,
    code_values,
    join_codes,
    join_values,
    prefix_codes,
)
from offload.kernels.codes import Codes, encode, inner_products, level_norm, noise, rotation
from offload.types import Partial

_DEVIATIONS = 3.0
"""With less, or without, keys that almost all of the softmax is on are missed twice as often."""


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
    scan: float = 0.6


@dataclass(frozen=True, slots=True)
class ResidualIndex(KeyIndex):
    """Token scores from clusters and residual codes, and an estimate of all that is not read.

    Attributes
    ----------
    settings : Settings
    clusters : Clusters
    keys : Codes
        Of the rotated residuals of the keys.
    values : ValueCodes
    spread, radius : Tensor, bfloat16 [num_heads, num_clusters]
        Root mean square of what the coded values miss, and of the residuals of the keys, in each
        cluster.
    """

    expects_errors = True

    settings: Settings
    clusters: Clusters
    keys: Codes
    values: ValueCodes
    spread: Tensor
    radius: Tensor

    @classmethod
    def build(cls, keys: Tensor, values: Tensor, **options: Any) -> Self:  # noqa: D102
        settings = Settings(**options)
        require_finite(keys, values)
        # New memory costs a CPU as much as arithmetic does, unless it is little and used again.
        step = 1 if keys.device.type == "cpu" else len(keys)
        heads = zip(keys.split(step), values.split(step), strict=True)
        parts = [cls._build_heads(*rows, settings) for rows in heads]
        named = [part.tensors() for part in parts]
        tensors = {name: torch.cat([own[name] for own in named]) for name in named[0]}
        return cls.restore(tensors, parts[0].meta())

    @classmethod
    def _build_heads(cls, keys: Tensor, values: Tensor, settings: Settings) -> Self:
        segments = zip(keys.split(SEGMENT_TOKENS, 1), values.split(SEGMENT_TOKENS, 1), strict=True)
        return cls.join([cls._build_segment(*segment, settings) for segment in segments])

    @classmethod
    def _build_segment(cls, keys: Tensor, values: Tensor, settings: Settings) -> Self:
        keys, values = keys.float(), values.float()
        clusters = cluster_segment(keys, values, settings.tokens_per_cluster)
        number = clusters.cluster_of()
        residuals = keys - rows_of_clusters(clusters.key_means(), number)
        turned = residuals @ rotation(keys.shape[-1]).to(keys.device)
        means = clusters.means_of_values()
        residuals = values - rows_of_clusters(means, number)
        codes = code_values(residuals)
        coded = codes.decode()
        # Coded residuals do not sum to zero as true ones do; the means make up for it, so that a
        # cluster whose tokens all weigh the same is estimated exactly.
        means = means - cluster_means(coded, number, means.shape[1])[0]
        narrow, scale = to_int8(means)
        clusters = replace(clusters, value_means=narrow, value_scale=scale)
        missed = values - rows_of_clusters(clusters.means_of_values(), number) - coded
        squares = torch.stack([missed.norm(dim=-1), turned.norm(dim=-1)], -1).square()
        spread, radius = (
            cluster_means(squares, number, means.shape[1])[0].sqrt().bfloat16().unbind(-1)
        )
        coded_keys = encode(turned, settings.num_bits, unbiased=True)
        return cls(settings, clusters, coded_keys, codes, spread, radius)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:  # noqa: D102
        if len(parts) == 1:
            return parts[0]
        return cls(
            agreed([part.settings for part in parts]),
            join_clusters([part.clusters for part in parts]),
            join_codes([part.keys for part in parts]),
            join_values([part.values for part in parts]),
            torch.cat([part.spread for part in parts], 1),
            torch.cat([part.radius for part in parts], 1),
        )

    def prefix(self, num_tokens: int) -> Self:  # noqa: D102
        clusters = self.clusters.prefix(num_tokens)
        return type(self)(
            self.settings,
            clusters,
            prefix_codes(self.keys, num_tokens),
            self.values.prefix(num_tokens, len(clusters.sizes)),
            self.spread[:, : clusters.counts.shape[1]],
            self.radius[:, : clusters.counts.shape[1]],
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
            "value_bits": self.values.codes.bits,
            "value_scale_code": self.values.codes.scale,
            "basis": self.values.basis,
            "spread": self.spread,
            "radius": self.radius,
        }

    def meta(self) -> dict[str, Any]:  # noqa: D102
        return {"settings": asdict(self.settings), "sizes": self.clusters.sizes}

    @classmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:  # noqa: D102
        return cls(
            Settings(**meta["settings"]),
            restore_clusters(tensors, meta["sizes"]),
            Codes(tensors["key_bits"], tensors["key_scale"]),
            ValueCodes(Codes(tensors["value_bits"], tensors["value_scale_code"]), tensors["basis"]),
            tensors["spread"],
            tensors["radius"],
        )

    def search(self, query: Tensor, budget: int, group: Combine = "max") -> Hits:  # noqa: D102
        estimate = self._estimate(query, budget, group)
        missed = self.spread.float().gather(1, estimate.own).clamp_min(1e-12)
        scores = torch.where(estimate.valid, estimate.shares + missed.log(), -math.inf)
        best = scores.topk(min(budget, scores.shape[1]), dim=1)
        estimate = replace(estimate, places=best.indices)
        ids = estimate.tokens.gather(1, best.indices)
        scanned = estimate.valid.sum() * (self.keys.bits.shape[-1] + 2)
        means = self.clusters.centroids.numel() + 2 * self.clusters.centroid_scale.numel()
        return Hits(
            torch.where(best.values > -math.inf, ids, NO_TOKEN), int(scanned) + means, estimate
        )

    def expected_errors(self, query: Tensor, hits: Hits) -> Tensor:  # noqa: D102
        estimate, spread = hits.state, self.spread.float()
        assert isinstance(estimate, _Estimate)
        assert estimate.places is not None
        lse = torch.logaddexp(estimate.logits.logsumexp(-1), estimate.others.logsumexp(-1))
        tokens = (estimate.logits - lse.unsqueeze(-1)).exp()
        clusters = (estimate.others - lse.unsqueeze(-1)).exp()
        # Errors of single tokens are independent, so their squares add up.
        squares = (tokens * spread.gather(1, estimate.own).unsqueeze(1)).square()
        counts = self.clusters.counts.clamp_min(1)
        fixed = ((clusters * spread.unsqueeze(1)).square() / counts.unsqueeze(1)).sum(-1)
        read = squares.gather(2, estimate.places.unsqueeze(1).expand(-1, squares.shape[1], -1))
        left = squares.sum(-1, keepdim=True) - pad(read.cumsum(-1), (1, 0))
        length = self._means(estimate, tokens, clusters).norm(dim=-1, keepdim=True)
        error = (left.clamp_min(0) + fixed.unsqueeze(-1)).sqrt() / length.clamp_min(1e-12)
        worst: Tensor = error.amax(1)
        return worst

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
        # A scanned token stands for its cluster's mean and its own coded residual.
        out = self._means(estimate, token_weights, weights)
        everywhere = token_weights.new_zeros(*token_weights.shape[:2], self.num_tokens)
        everywhere.scatter_(2, estimate.tokens.unsqueeze(1).expand_as(token_weights), token_weights)
        lengths = [num_tokens for num_tokens, _ in self.clusters.sizes]
        return Partial(out + self.values.sum(everywhere, lengths), lse)

    def _means(self, estimate: "_Estimate", tokens: Tensor, clusters: Tensor) -> Tensor:
        """Sum the value means of clusters, weighted by scanned tokens and by other clusters."""
        places = estimate.own.unsqueeze(1).expand_as(tokens)
        return torch.bmm(clusters.scatter_add(2, places, tokens), self.clusters.means_of_values())

    def _estimate(self, query: Tensor, budget: int, group: Combine) -> "_Estimate":
        """Score clusters, then the tokens of the best of them: more of these than are wanted."""
        clusters = self.clusters
        logits = torch.bmm(query, clusters.key_means().mT)
        masses = logits + clusters.counts.float().log().unsqueeze(1)
        scanned = self._best_clusters(query, masses, budget, group)
        number = clusters.cluster_of()
        inside = scanned.gather(1, number)
        tokens, valid = _places_of(inside)
        own = number.gather(1, tokens)
        residual, variance = self._residual_logits(query, tokens)
        of_cluster = logits.gather(2, own.unsqueeze(1).expand(-1, query.shape[1], -1))
        raw = (of_cluster + residual).masked_fill(~valid.unsqueeze(1), -math.inf)
        # The mean of exp(x + noise) is exp(x + variance / 2). Half of that is taken out: tokens
        # whose noise was upward are mostly read, and those that are left err downward already.
        per_token = raw - variance / 4
        others = masses.masked_fill(scanned.unsqueeze(1), -math.inf)
        total = torch.logaddexp(per_token.logsumexp(-1), others.logsumexp(-1))
        # Reading a token costs little, missing one that matters much: hope for two deviations.
        shares = combine_shares(raw + 2 * variance.sqrt() - total.unsqueeze(-1), group)
        return _Estimate(tokens, own, valid, shares, per_token, others)

    def _best_clusters(self, query: Tensor, masses: Tensor, budget: int, group: Combine) -> Tensor:
        """Return which clusters to scan, bool ``[num_heads, num_clusters]``.

        A key that matters may differ much from its cluster: clusters count as if their keys had a
        logit of some deviations above that of the mean.
        """
        deviation = self.radius.float().unsqueeze(1) * query.norm(dim=-1, keepdim=True)
        hoped = masses + _DEVIATIONS / math.sqrt(query.shape[-1]) * deviation
        order = combine_group(hoped, group).argsort(1, descending=True)
        counts = self.clusters.counts.long().gather(1, order)
        wanted = max(int(self.settings.scan * self.num_tokens), 2 * budget)
        chosen = counts.cumsum(1) - counts < wanted
        return torch.zeros_like(chosen).scatter_(1, order, chosen)

    def _residual_logits(self, query: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the residuals of tokens add to their logits, and the variance of that."""
        num_bits, dim = self.settings.num_bits, query.shape[-1]
        width = self.keys.bits.shape[-1]
        bits = self.keys.bits.gather(1, tokens.unsqueeze(-1).expand(-1, -1, width))
        scale = self.keys.scale.gather(1, tokens)
        turned = query @ rotation(dim).to(query.device)
        residual = inner_products(turned, Codes(bits, scale), num_bits)
        deviation = noise(num_bits, dim) * level_norm(num_bits, dim) * scale.float().abs()
        variance = (query.norm(dim=-1).unsqueeze(-1) * deviation.unsqueeze(1)).square()
        return residual, variance


@dataclass(frozen=True, slots=True)
class _Estimate:
    """Attention estimated for all tokens.

    Attributes
    ----------
    tokens, own : Tensor, int64 [num_heads, num_scanned]
        Those that were scanned, and the cluster of each.
    valid : Tensor, bool, likewise
    shares : Tensor, shape (num_heads, num_scanned)
        Log of the largest share of the softmax that any query may give a token.
    logits : Tensor, shape (num_heads, num_queries, num_scanned)
        ``-inf`` where not valid.
    others : Tensor, shape (num_heads, num_queries, num_clusters)
        Log mass of each cluster that was not scanned; ``-inf`` for the others.
    places : Tensor or None, int64 [num_heads, num_hits]
        Where the hits are among the scanned tokens.
    """

    tokens: Tensor
    own: Tensor
    valid: Tensor
    shares: Tensor
    logits: Tensor
    others: Tensor
    places: Tensor | None = None


def _places_of(inside: Tensor) -> tuple[Tensor, Tensor]:
    """Return where each row is true, in order, and which of these places are no filling."""
    counts = inside.sum(1, keepdim=True)
    longest = int(counts.max())
    rank = torch.where(inside, inside.cumsum(1) - 1, longest)
    every = torch.arange(inside.shape[1], device=inside.device).expand_as(rank)
    places = rank.new_zeros(len(rank), longest + 1).scatter_(1, rank, every)[:, :longest]
    return places, torch.arange(longest, device=inside.device) < counts
