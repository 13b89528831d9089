import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from offload.errors import ConfigError
from offload.evals.parametric import Shape, make_head
from offload.index.ann import AnnIndex
from offload.index.base import KeyIndex
from offload.index.faiss_kinds import KINDS, AnnSettings
from offload.index.graph_settings import GraphSettings
from offload.index.projection import ProjectionIndex


def random_rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def best(keys: Tensor, query: Tensor, count: int) -> Tensor:
    """Return the best keys for one query per head, sorted."""
    return torch.bmm(query, keys.mT)[:, 0].topk(count, 1).indices.sort(1).values


def recall(index: KeyIndex, keys: Tensor, query: Tensor, count: int) -> float:
    """Of one query per head."""
    found = index.search(query, count).ids
    return float(
        (found.unsqueeze(2) == best(keys, query, count).unsqueeze(1)).sum() / found.numel()
    )


EXACT = [
    pytest.param({"kind": "ivf", "scan": 1.0}, id="ivf"),
    pytest.param({"kind": "ivf", "scan": 1.0, "segment_tokens": 300}, id="ivf in segments"),
    pytest.param({"kind": "ivf", "scan": 1.0, "tokens_per_list": 10**6}, id="one list"),
    pytest.param({"kind": "hnsw", "beam": 1000}, id="hnsw"),
    pytest.param({"kind": "hnsw", "beam": 1000, "segment_tokens": 300}, id="hnsw in segments"),
]


@pytest.mark.parametrize("options", EXACT)
def test_index_that_looks_at_every_key_finds_the_best_of_them(options: dict[str, Any]) -> None:
    keys, query = random_rows(2, 1000, 64), random_rows(2, 1, 64, seed=1)
    found = AnnIndex.build(keys, keys, **options).search(query, 30).ids
    assert torch.equal(found.sort(1).values, best(keys, query, 30))


@pytest.mark.parametrize(("kind", "least"), [("ivf_rabitq", 0.4), ("pq", 0.4), ("hnsw", 0.95)])
def test_index_with_default_settings_finds_most_of_the_best(kind: str, least: float) -> None:
    keys, query = random_rows(8, 3000, 64), random_rows(8, 1, 64, seed=1)
    index = AnnIndex.build(keys, keys, kind=kind, scan=1.0)
    assert recall(index, keys, query, 50) > least


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_keys", [1, 2, 15, 16, 17, 200])
def test_index_of_equal_keys_finds_as_many_as_asked(kind: str, num_keys: int) -> None:
    keys = random_rows(1, 1, 64).repeat(2, num_keys, 1)
    hits = AnnIndex.build(keys, keys, kind=kind).search(random_rows(2, 2, 64, seed=1), 12)
    for row in hits.ids:
        assert len(set(row.tolist())) == min(12, num_keys)
        assert bool((row >= 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_query_of_zeros_and_keys_of_zeros_find_as_many_as_asked(kind: str) -> None:
    keys, query = random_rows(1, 300, 64), random_rows(1, 1, 64, seed=1)
    keys, query = torch.cat([keys, 0 * keys]), torch.cat([0 * query, query])
    ids = AnnIndex.build(keys, keys, kind=kind).search(query, 12).ids
    for row in ids:
        assert len(set(row.tolist())) == 12
        assert bool((row >= 0).all())


@pytest.mark.parametrize("kind", KINDS)
def test_one_key_of_huge_length_is_found_and_hides_no_other(kind: str) -> None:
    keys, query = random_rows(2, 2000, 64), random_rows(2, 1, 64, seed=1)
    keys[:, 700] = 1e4 * query[:, 0]
    keys[:, 900] = 9 * query[:, 0]
    found = AnnIndex.build(keys, keys, kind=kind, scan=0.3).search(query, 100).ids
    for row in found:
        assert 700 in row.tolist()
        assert 900 in row.tolist() or kind == "pq"  # Its codes are spent on the huge one.


@pytest.mark.parametrize("dim", [8, 10, 36, 130])
@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_any_width_are_indexed_and_restored(kind: str, dim: int) -> None:
    keys, query = random_rows(2, 400, dim), random_rows(2, 2, dim, seed=1)
    index = AnnIndex.build(keys, keys, kind=kind)
    hits = index.search(query, 20)
    restored = AnnIndex.restore(index.tensors(), json.loads(json.dumps(index.meta())))
    assert torch.equal(restored.search(query, 20).ids, hits.ids)
    assert index.num_bytes > 0


def test_scan_of_all_lists_reads_keys_centroids_and_ids_once_per_query() -> None:
    keys, query = random_rows(1, 1000, 64), random_rows(1, 3, 64, seed=1)
    index = AnnIndex.build(keys, keys, scan=1.0, tokens_per_list=10**6)
    assert index.search(query, 10).scanned_bytes == 3 * (1000 + 1) * 64 * 4


@pytest.mark.parametrize(
    ("less", "more"),
    [
        (AnnSettings(scan=0.05), AnnSettings(scan=0.5)),
        (AnnSettings("hnsw", beam=20), AnnSettings("hnsw", beam=100)),
    ],
    ids=lambda settings: settings.kind,
)
def test_smaller_scan_and_beam_read_less(less: AnnSettings, more: AnnSettings) -> None:
    keys, query = random_rows(1, 4000, 64), random_rows(1, 2, 64, seed=1)
    index = AnnIndex.build(keys, keys, kind=less.kind)
    read = [replace(index, settings=s).search(query, 10).scanned_bytes for s in (less, more)]
    assert 0 < read[0] < read[1]


def test_beam_grows_with_the_budget_and_with_the_keys() -> None:
    settings = GraphSettings(beam=50, keys_per_place=100)
    assert [settings.beam_for(5000, 9), settings.beam_for(5000, 90)] == [50, 90]
    assert settings.beam_for(50000, 90) == 500


@pytest.mark.parametrize("kind", KINDS)
def test_same_keys_give_the_same_index(kind: str) -> None:
    keys = random_rows(2, 1500, 32)
    first, second = (AnnIndex.build(keys, keys, kind=kind).tensors()["indexes"] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "annoy"}, "unknown kind of index 'annoy'; known: ivf, ivf_rabitq, pq, hnsw"),
        ({"scan": 0.0}, "scan=0.0"),
        ({"scan": 1.5}, "scan=1.5"),
        ({"scan": math.nan}, "scan=nan"),
        ({"beam": 0}, "beam=0"),
        ({"degree": -1}, "degree=-1"),
        ({"tokens_per_list": 0}, "tokens_per_list=0"),
        ({"segment_tokens": 0}, "segment_tokens=0"),
    ],
)
def test_setting_that_is_none_is_refused_by_name(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AnnSettings(**options)


@pytest.mark.parametrize(
    "shape", [(2, 0, 16), (1, 5, 16), (3, 5, 16), (2, 5, 15)], ids=lambda shape: f"{shape}"
)
def test_graph_from_queries_that_do_not_fit_the_keys_is_refused(shape: tuple[int, ...]) -> None:
    keys = random_rows(2, 30, 16)
    with pytest.raises(ConfigError, match="for keys of shape"):
        ProjectionIndex.build(keys, keys, queries=torch.zeros(shape))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_graph_from_a_query_that_is_not_finite_is_refused_naming_it(bad: float) -> None:
    keys, queries = random_rows(2, 30, 16), random_rows(2, 9, 16)
    queries[1, 7, 3] = bad
    with pytest.raises(ConfigError, match="query 7 of head 1 is not finite"):
        ProjectionIndex.build(keys, keys, queries=queries)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_graph_from_queries_of_any_scale_is_the_same(scale: float) -> None:
    keys, queries = random_rows(1, 1000, 16), random_rows(1, 300, 16, seed=1)
    plain = ProjectionIndex.build(keys, keys, queries=queries, beam=50)
    scaled = ProjectionIndex.build(keys, keys, queries=queries * scale, beam=50)
    same = (plain.neighbours == scaled.neighbours).float().mean()
    assert float(same) > 0.999


def test_graph_from_many_queries_looks_at_as_many_as_it_may() -> None:
    keys, queries = random_rows(1, 1000, 16), random_rows(1, 300, 16, seed=1)
    options = {"beam": 50, "max_queries": 100}
    few = ProjectionIndex.build(keys, keys, queries=queries[:, ::3], **options)
    many = ProjectionIndex.build(keys, keys, queries=queries, **options)
    assert torch.equal(few.neighbours, many.neighbours)


def test_graph_without_queries_is_built_from_the_keys() -> None:
    keys = random_rows(1, 1000, 16)
    alone = ProjectionIndex.build(keys, keys, beam=50)
    own = ProjectionIndex.build(keys, keys, queries=keys, beam=50)
    assert torch.equal(alone.neighbours, own.neighbours)


@pytest.mark.slow
def test_graph_over_keys_unlike_queries_finds_nine_in_ten_reading_less_than_a_twelfth() -> None:
    head = make_head(Shape(num_train_queries=4096, num_queries=16))
    keys, train = head.keys.unsqueeze(0), head.train_queries.unsqueeze(0)
    index = ProjectionIndex.build(keys, keys, queries=train)
    shares, recalls = [], []
    for query in head.queries:
        hits = index.search(query.view(1, 1, -1), 100)
        shares.append(hits.scanned_bytes / keys.nbytes)
        recalls.append(recall(index, keys, query.view(1, 1, -1), 100))
    assert sum(recalls) / len(recalls) >= 0.9
    assert sum(shares) / len(shares) <= 0.08
