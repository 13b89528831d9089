"""Clusters, and codes of what each key and value differs from its cluster: scores per token.

The logit of a key is that of its centroid plus the coded residual's (an IVF-RaBitQ with short
lists), so a few bytes per key say which tokens matter, and only those are read. Everything else is
estimated: tokens of clusters that were scanned with a weight and a value of their own, the other
clusters from their means. From RetroInfer (clusters, estimation zone), ParisKV (codes) and RaBitQ
(estimator); ours are the two together, residual codes instead of codes of whole keys, the
correction for the noise of the estimate inside the exponential, and coded value residuals.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from offload.index.base import Combine, Hits, KeyIndex, agreed, require_finite
from offload.index.clusters import (
    SEGMENT_TOKENS,
    Clusters,
    cluster_segment,
    join_clusters,
    restore_clusters,
    to_int8,
)
from offload.index.kmeans import cluster_means, rows_of_clusters
from offload.index.value_codes import ValueCodes, code_values, join_values
from offload.kernels import dispatch
from offload.kernels.codes import BLOCK_PLACES, Codes, encode, rotation
from offload.kernels.reference import merge
from offload.kernels.scan import Scan, ScanTables, estimate_hits, output_length
from offload.types import Partial


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
        num_tokens = keys.shape[1]
        order = clusters.order[:, :num_tokens].long()
        keys, values = rows_of_clusters(keys, order), rows_of_clusters(values, order)
        number = clusters.cluster_of_places()[:, :num_tokens]
        residuals = keys - rows_of_clusters(clusters.key_means(), number)
        turned = residuals @ rotation(keys.shape[-1]).to(keys.device)
        means = clusters.means_of_values()
        residuals = values - rows_of_clusters(means, number)
        codes = code_values(residuals)
        coded = codes.decode()[:, :num_tokens]
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
            Codes(*(torch.cat(pair, 1) for pair in zip(*(p.keys for p in parts), strict=True))),
            join_values([part.values for part in parts]),
            torch.cat([part.spread for part in parts], 1),
            torch.cat([part.radius for part in parts], 1),
        )

    def prefix(self, num_tokens: int) -> Self:  # noqa: D102
        clusters = self.clusters.prefix(num_tokens)
        num_places, num_clusters = clusters.order.shape[1], clusters.counts.shape[1]
        num_blocks = num_places // BLOCK_PLACES
        return type(self)(
            self.settings,
            clusters,
            Codes(self.keys.bits[:, :num_blocks], self.keys.scale[:, :num_places]),
            self.values.prefix(num_places, len(clusters.sizes)),
            self.spread[:, :num_clusters],
            self.radius[:, :num_clusters],
        )

    @property
    def num_heads(self) -> int:  # noqa: D102
        return self.clusters.counts.shape[0]

    @property
    def num_tokens(self) -> int:  # noqa: D102
        return self.clusters.num_tokens

    def tensors(self) -> Mapping[str, Tensor]:  # noqa: D102
        return {
            **self.clusters.tensors(),
            "key_bits": self.keys.bits,
            "key_scale": self.keys.scale,
            "value_bits": self.values.bits,
            "value_scale_code": self.values.scale,
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
            ValueCodes(tensors["value_bits"], tensors["value_scale_code"], tensors["basis"]),
            tensors["spread"],
            tensors["radius"],
        )

    def tables(self) -> ScanTables:
        """Return the tensors as kernels take them."""
        clusters, values = self.clusters, self.values
        return ScanTables(
            clusters.centroids,
            clusters.centroid_scale,
            clusters.value_means,
            clusters.value_scale,
            clusters.counts,
            self.spread,
            self.radius,
            self.keys.bits,
            self.keys.scale,
            values.bits,
            values.scale,
            values.basis,
            clusters.sizes,
            self.settings.num_bits,
            self.settings.scan,
        )

    def search(  # noqa: D102
        self, query: Tensor, budget: int, group: Combine = "max", past: Hits | None = None
    ) -> Hits:
        found = dispatch.scan(self.tables(), query, budget, group)
        per_place = self.keys.bits[0, 0].nbytes // BLOCK_PLACES + 2
        means = self.clusters.centroids.numel() + 2 * self.clusters.centroid_scale.numel()
        return Hits(
            self.clusters.tokens_at(found.places),
            found.num_scanned * per_place + means,
            found,
        )

    def expected_errors(self, query: Tensor, hits: Hits) -> Tensor:  # noqa: D102
        found = hits.state
        assert isinstance(found, Scan)
        shares = (found.logits - found.lse().unsqueeze(-1)).exp()
        errors = shares * self.spread.float().gather(1, found.clusters).unsqueeze(1)
        unread = pad(errors.square().flip(-1).cumsum(-1).flip(-1), (0, 1))
        total = (unread + found.squares.unsqueeze(-1)).sqrt()
        length = output_length(self.tables(), found).clamp_min(1e-12)
        worst: Tensor = (total / length.unsqueeze(-1)).amax(1)
        return worst

    def tail(self, query: Tensor, hits: Hits, have: Tensor, values: Tensor) -> Partial | None:  # noqa: D102
        found = hits.state
        assert isinstance(found, Scan)
        read = pad(have & hits.found, (0, found.places.shape[1] - have.shape[1]))
        missing = ~read & (found.places >= 0)
        if not bool(missing.any()):
            return found.rest
        return merge([found.rest, estimate_hits(self.tables(), found, missing)])
