"""Keys, values and queries made to break an index: every index stays valid, finite and, at the end
of its budget, exact. The contract asks the same of ordinary input."""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from offload.errors import ConfigError
from offload.index.ann import AnnIndex
from offload.index.base import KeyIndex
from offload.index.bounds import BoundsIndex
from offload.index.clusters import SEGMENT_TOKENS, ClusterIndex
from offload.index.faiss_kinds import KINDS
from offload.index.kmeans import spherical_kmeans
from offload.index.mean import MeanIndex
from offload.index.projection import ProjectionIndex
from offload.index.residual import ResidualIndex
from offload.index.topk import TopKIndex
from offload.index.tree import TreeIndex
from tests.contracts.index_contract import (
    error,
    found_values,
    full_attention,
    random_rows,
    sparse_attention,
    with_needles,
)

Build = Callable[..., KeyIndex]

ADAPTIVE: dict[str, Build] = {
    "adaptive": ResidualIndex.build,
    "adaptive, 1 bit": partial(ResidualIndex.build, num_bits=1),
}
INDEXES: dict[str, Build] = {
    **ADAPTIVE,
    "clusters": ClusterIndex.build,
    "bounds": BoundsIndex.build,
    "tree": partial(TreeIndex.build, leaf_tokens=8),
    "tree of codes": partial(TreeIndex.build, leaf_tokens=8, num_levels=3, bits=8),
    "mean": MeanIndex.build,
    "cosine": partial(MeanIndex.build, is_cosine=True),
    "representatives": partial(MeanIndex.build, chunk_tokens=32, representatives=4),
    "oracle": TopKIndex.build,
    "oracle, renormalised": partial(TopKIndex.build, renormalised=True),
    "projection": ProjectionIndex.build,
    **{kind: partial(AnnIndex.build, kind=kind) for kind in KINDS},
}
TOKENS, DIM = 640, 64


@dataclass(frozen=True)
class Rows:
    """Two heads: keys and values of ``TOKENS`` tokens, and scaled queries."""

    keys: Tensor
    values: Tensor
    query: Tensor


def plain(value_dim: int = DIM, group: int = 3, dtype: torch.dtype = torch.float32) -> Rows:
    keys, values = random_rows(2, TOKENS, DIM), random_rows(2, TOKENS, value_dim, seed=1)
    return Rows(keys.to(dtype), values.to(dtype), random_rows(2, group, DIM, seed=2) / 4)


def scaled(keys: float = 1.0, values: float = 1.0, query: float = 1.0) -> Rows:
    rows = plain()
    return Rows(rows.keys * keys, rows.values * values, rows.query * query)


def repeated(num_different: int) -> Rows:
    """So few different keys that most clusters are empty."""
    rows = plain()
    return Rows(rows.keys[:, torch.arange(TOKENS) % num_different], rows.values, rows.query)


def opposite() -> Rows:
    rows = plain()
    signs = 1 - 2 * (torch.arange(TOKENS) % 2)
    return Rows(rows.keys[:, :1] * signs.view(1, -1, 1), rows.values, rows.query)


def one_long() -> Rows:
    rows = plain()
    rows.keys[:, 333] *= 100
    return rows


def one_channel() -> Rows:
    """A channel with an activation a thousand times that of the others, as some models have."""
    rows = plain()
    rows.keys[..., 5] += 1000
    rows.query[..., 5] = 0.01
    return rows


def all_but_one_zero() -> Rows:
    rows = plain()
    rows.keys[:, torch.arange(TOKENS) != 7] = 0
    return rows


ADVERSARIES: dict[str, Callable[[], Rows]] = {
    "scores of ten thousand": partial(scaled, keys=600, query=2),
    "subnormal keys": partial(scaled, keys=1e-40),
    "subnormal values": partial(scaled, values=1e-40),
    "keys of 1e8": partial(scaled, keys=1e8, query=1e-8),
    "values of 1e8": partial(scaled, values=1e8),
    "queries of zeros": partial(scaled, query=0.0),
    "keys of zeros but one": all_but_one_zero,
    "equal keys": partial(repeated, 1),
    "three different keys": partial(repeated, 3),
    "opposite keys": opposite,
    "one key of a hundredfold length": one_long,
    "one huge channel": one_channel,
    "narrow values": partial(plain, value_dim=20),
    "wide values": partial(plain, value_dim=96),
    "group of eight": partial(plain, group=8),
    "float16": partial(plain, dtype=torch.float16),
    "bfloat16": partial(plain, dtype=torch.bfloat16),
}

every_index = pytest.mark.parametrize("name", INDEXES)
every_adversary = pytest.mark.parametrize("adversary", ADVERSARIES)
every_adaptive = pytest.mark.parametrize("build", ADAPTIVE.values(), ids=ADAPTIVE)


@functools.cache
def case(name: str, adversary: str) -> tuple[KeyIndex, Rows]:
    rows = ADVERSARIES[adversary]()
    return INDEXES[name](rows.keys, rows.values), rows


@every_adversary
@every_index
@pytest.mark.parametrize("budget", [1, 40])
def test_found_ids_are_distinct_tokens_within_the_budget(
    name: str, adversary: str, budget: int
) -> None:
    index, rows = case(name, adversary)
    hits = index.search(rows.query, budget)
    for row, found in zip(hits.ids, hits.found, strict=True):
        ids = row[found].tolist()
        assert len(ids) == len(set(ids)) <= budget
        assert set(ids) <= set(range(TOKENS))


@every_adversary
@pytest.mark.parametrize("name", [name for name in INDEXES if name != "pq"])
def test_budget_is_used(name: str, adversary: str) -> None:
    """The fast scan of FAISS finds nothing where all scores are equal, so not by ``pq``."""
    index, rows = case(name, adversary)
    assert bool(index.search(rows.query, 40).found.any(1).all())


@every_adversary
@every_index
def test_everything_read_is_full_attention(name: str, adversary: str) -> None:
    index, rows = case(name, adversary)
    hits = index.search(rows.query, TOKENS)
    out = sparse_attention(index, rows.query, rows.keys, rows.values, hits, hits.found)
    wanted = full_attention(rows.query, rows.keys, rows.values)
    assert (out - wanted).abs().max() <= 1e-5 * rows.values.abs().max()


@every_adversary
@every_index
@pytest.mark.parametrize("budget", [0, 40])
def test_output_and_tail_are_finite(name: str, adversary: str, budget: int) -> None:
    index, rows = case(name, adversary)
    hits = index.search(rows.query, budget)
    tail = index.tail(rows.query, hits, hits.found, found_values(rows.values, hits))
    if tail is not None:
        assert bool(torch.isfinite(tail.out).all())
        assert bool(torch.isfinite(tail.lse).all())
    out = sparse_attention(index, rows.query, rows.keys, rows.values, hits, hits.found)
    assert bool(torch.isfinite(out).all())


@every_adversary
@every_index
def test_expected_errors_are_finite_and_fall_with_every_token_read(
    name: str, adversary: str
) -> None:
    index, rows = case(name, adversary)
    hits = index.search(rows.query, 40)
    if not index.expects_errors:
        with pytest.raises(ConfigError, match="cannot tell how far off"):
            index.expected_errors(rows.query, hits)
        return
    errors = index.expected_errors(rows.query, hits)
    assert bool(torch.isfinite(errors).all())
    assert bool((errors.diff() <= 0).all())


@every_index
def test_equal_values_are_returned_whatever_is_read(name: str) -> None:
    rows = plain()
    values = rows.values[:, :1].expand(-1, TOKENS, -1)
    index = INDEXES[name](rows.keys, values)
    hits = index.search(rows.query, 40)
    out = sparse_attention(index, rows.query, rows.keys, values, hits, hits.found)
    assert error(out, full_attention(rows.query, rows.keys, values)) < 0.01


@every_adaptive
@pytest.mark.parametrize("adversary", ["equal keys", "three different keys", "opposite keys"])
def test_keys_that_clusters_describe_are_estimated_within_four_percent(
    build: Build, adversary: str
) -> None:
    rows = ADVERSARIES[adversary]()
    values = 1 + rows.values / 3
    index = build(rows.keys, values)
    hits = index.search(rows.query, 0)
    out = sparse_attention(index, rows.query, rows.keys, values, hits, hits.found)
    assert error(out, full_attention(rows.query, rows.keys, values)) < 0.04


@every_adaptive
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_needles_of_a_group_are_found_and_the_answer_is_theirs(
    build: Build, head_dim: int, group: int, dtype: torch.dtype
) -> None:
    query = random_rows(2, group, head_dim, seed=1) / 4
    needles = [40 + 61 * number for number in range(group)]
    keys = with_needles(random_rows(2, TOKENS, head_dim) / 10, query, needles).to(dtype)
    values = random_rows(2, TOKENS, head_dim, seed=3).to(dtype)
    index = build(keys, values)
    hits = index.search(query, 8 * group)
    for row in hits.ids:
        assert set(needles) <= set(row.tolist())
    out = sparse_attention(index, query, keys, values, hits, hits.found)
    assert error(out, full_attention(query, keys, values)) < 1e-3


@every_adaptive
@pytest.mark.parametrize(("keys", "values"), [(2.0**20, 1.0), (2.0**-20, 2.0**20), (1.0, 2.0**-20)])
def test_units_of_keys_and_values_do_not_matter(build: Build, keys: float, values: float) -> None:
    one, other = plain(), scaled(keys=keys, values=values, query=1 / keys)
    outs = []
    for rows in (one, other):
        index = build(rows.keys, rows.values)
        hits = index.search(rows.query, 40)
        outs.append(sparse_attention(index, rows.query, rows.keys, rows.values, hits, hits.found))
    torch.testing.assert_close(outs[1], outs[0] * values, rtol=1e-4, atol=1e-5 * values)


@every_adaptive
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_index_of_narrow_rows_equals_that_of_the_same_rows_in_float32(
    build: Build, dtype: torch.dtype
) -> None:
    rows = plain(dtype=dtype)
    narrow, wide = build(rows.keys, rows.values), build(rows.keys.float(), rows.values.float())
    for name, tensor in wide.tensors().items():
        assert torch.equal(narrow.tensors()[name], tensor), name


@every_adaptive
@pytest.mark.parametrize("num_tokens", [1, 2, 31, 33, SEGMENT_TOKENS - 1, SEGMENT_TOKENS + 1])
@pytest.mark.parametrize("place", ["first", "last"])
def test_needle_at_the_edge_of_a_run_of_any_length_is_found(
    build: Build, num_tokens: int, place: str
) -> None:
    query, needle = random_rows(1, 1, 32, seed=1) / 4, 0 if place == "first" else num_tokens - 1
    keys = with_needles(random_rows(1, num_tokens, 32) / 10, query, [needle])
    assert needle in build(keys, keys).search(query, 4).ids


@every_adaptive
@pytest.mark.parametrize("distance", [1, 10, 100])
@pytest.mark.parametrize("seed", range(3))
def test_needle_in_a_cluster_of_outliers_is_found(build: Build, distance: int, seed: int) -> None:
    """A far group of keys, none of which the query wants, and among them the one that it does."""
    query = random_rows(2, 1, DIM, seed=seed) / 4
    keys = random_rows(2, 2000, DIM, seed=seed + 9) / 10
    away = random_rows(2, 1, DIM, seed=seed + 50)
    towards = query / query.square().sum(-1, keepdim=True)
    away = normalize(away - (away * query).sum(-1, keepdim=True) * towards, dim=-1)
    keys[:, 900:940] += distance * away
    keys[:, 920] += 20 * towards[:, 0]
    hits = build(keys, random_rows(2, 2000, DIM)).search(query, 40)
    assert bool((hits.ids == 920).any(1).all())


@every_adaptive
def test_clusters_of_single_keys_estimate_what_is_not_read(build: Build) -> None:
    rows = plain()
    index = build(rows.keys, rows.values, tokens_per_cluster=1)
    hits = index.search(rows.query, 0)
    out = sparse_attention(index, rows.query, rows.keys, rows.values, hits, hits.found)
    assert error(out, full_attention(rows.query, rows.keys, rows.values)) < 0.05


@pytest.mark.parametrize("num_clusters", [2, 3, 256, 300])
@pytest.mark.parametrize("sign", [1, -1], ids=["towards", "away"])
@pytest.mark.parametrize("length", [1e-10, 1.0, 1e15])
def test_keys_go_to_the_centroid_of_the_largest_cosine(
    num_clusters: int, sign: int, length: float
) -> None:
    """Also where all cosines are negative, as those of keys in a cone and centroids opposite."""
    keys = random_rows(2, 1500, 16) * length
    starts = torch.arange(num_clusters) * 1500 // num_clusters
    keys[..., 0] = -4 * length
    keys[:, starts, 0] = -4 * sign * length
    assignment, _ = spherical_kmeans(keys, num_clusters, num_iterations=0)
    directions = normalize(keys.double(), dim=-1)
    cosines = directions @ directions[:, starts].mT
    found = cosines.gather(2, assignment.unsqueeze(-1)).squeeze(-1)
    best = cosines.amax(-1)
    assert bool((best - found <= best.abs() / 2**13).all())


@every_adaptive
def test_heads_indexed_together_are_as_if_indexed_alone(build: Build) -> None:
    rows = plain()
    whole = build(rows.keys, rows.values).tensors()
    parts = [build(rows.keys[h : h + 1], rows.values[h : h + 1]).tensors() for h in range(2)]
    for name, tensor in whole.items():
        assert torch.equal(tensor, torch.cat([part[name] for part in parts])), name


@every_index
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_narrow_rows_that_are_not_finite_are_refused(
    name: str, bad: float, dtype: torch.dtype
) -> None:
    rows = plain(dtype=dtype)
    rows.keys[1, 500, 3] = bad
    with pytest.raises(ConfigError, match="key of token 500, head 1 is not finite"):
        INDEXES[name](rows.keys, rows.values)
