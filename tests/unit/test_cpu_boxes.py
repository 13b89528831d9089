"""Compiled searches of trees of boxes find what the definition in plain torch finds."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from offload.index.tree import TreeIndex
from offload.kernels import box_search
from offload.kernels.boxes import BoxCut
from offload.kernels.scan import Combine
from tests.support.topic_keys import topic_keys, topic_queries

pytest.importorskip("numba", reason="compiled kernels need numba")
from offload.kernels import cpu_boxes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
KINDS: dict[str, dict[str, Any]] = {
    "two levels": {},
    "three levels": {"num_levels": 3, "leaf_tokens": 8},
    "codes": {"bits": 8},
    "frontier": {"num_levels": 3, "leaf_tokens": 8, "patience": 2, "over": 1.0},
    "frontier of codes": {"leaf_tokens": 8, "patience": 1, "bits": 8},
    "layer": {"scope": "layer", "leaf_tokens": 8, "num_levels": 3, "patience": 2},
    "flat": {"flat_from": 0.0},
    "ranked by the middle": {"lean": 0.5, "leaf_tokens": 8, "num_levels": 3, "patience": 2},
    "middle, codes": {"lean": 0.5, "leaf_tokens": 8, "bits": 8},
    "middle, flat": {"lean": 0.5, "flat_from": 0.0},
    "above the middle": {"lean": 0.75, "leaf_tokens": 8, "num_levels": 3, "patience": 2},
    "above the middle, codes": {"lean": 0.75, "leaf_tokens": 8, "bits": 8},
    "above the middle, layer": {"lean": 0.75, "scope": "layer", "leaf_tokens": 8},
}


def check_equal_searches(
    index: TreeIndex, queries: Tensor, budget: int, group: Combine = "max"
) -> None:
    """Let both go on from the same state at every step.

    What they decode of codes differs in the last bit, which may move a node across a cut.
    """
    least = 1.0 if index.settings.bits is None else 0.98
    rules, past = index.settings.rules(), None
    for query in queries:
        plain = box_search.search_boxes(index.tree, query, budget, group, rules, past)
        fast = cpu_boxes.search_boxes(index.tree, query, budget, group, rules, past)
        assert fast.ids.shape == plain.ids.shape
        assert bool(((fast.ids >= 0) == (plain.ids >= 0)).all())
        shared = [torch.isin(a, b).float().mean() for a, b in zip(fast.ids, plain.ids, strict=True)]
        assert fast.ids.numel() == 0 or min(shared) >= least
        assert (fast.cut.split == plain.cut.split).float().mean() >= least
        slip = 1e-3 if least == 1 else 0.1
        torch.testing.assert_close(fast.cut.slack, plain.cut.slack, atol=slip, rtol=slip)
        assert plain.num_scored * least <= fast.num_scored <= plain.num_scored / least
        past = BoxCut(plain.cut.split.clone(), plain.cut.slack.clone())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_steps_of_a_moving_query_equal_those_of_the_definition(
    dtype: torch.dtype, kind: str
) -> None:
    keys, topics = topic_keys(3, 3001, 64)
    queries = topic_queries(topics, 6, 4) * 0.3
    index = TreeIndex.build(keys.to(dtype), keys, **KINDS[kind])
    check_equal_searches(index, queries, 300)


@pytest.mark.parametrize("num_queries", [1, 3, 4, 7, 8])
@pytest.mark.parametrize("dim", [20, 64, 80])
@pytest.mark.parametrize("group", ["max", "sum"])
def test_groups_and_widths_of_any_size_equal_the_definition(
    group: Combine, dim: int, num_queries: int
) -> None:
    keys, topics = topic_keys(2, 2000, dim)
    queries = topic_queries(topics, 2, num_queries) * 0.3
    check_equal_searches(TreeIndex.build(keys, keys, leaf_tokens=8), queries, 150, group)


@pytest.mark.parametrize("budget", [0, 1, 33, 150, 600, 5000])
@pytest.mark.parametrize("num_tokens", [1, 31, 32, 33, 1025])
def test_few_tokens_and_budgets_of_any_size_equal_the_definition(
    num_tokens: int, budget: int
) -> None:
    keys, topics = topic_keys(2, num_tokens, 16)
    check_equal_searches(TreeIndex.build(keys, keys), topic_queries(topics, 2, 2), budget)


@pytest.mark.parametrize("bits", [None, 8])
def test_beginning_of_a_longer_index_is_searched_as_an_index_of_its_own(bits: int | None) -> None:
    keys, topics = topic_keys(3, 4096, 64)
    options = {"leaf_tokens": 8, "bits": bits}
    parts = [TreeIndex.build(part, part, **options) for part in keys.bfloat16().split(1024, 1)]
    view = TreeIndex.join(parts).prefix(2048)
    assert not view.tensors()["lower"].is_contiguous()
    check_equal_searches(view, topic_queries(topics, 3, 4) * 0.3, 200)


def test_searches_that_must_be_certified_are_left_to_the_definition() -> None:
    keys = topic_keys(1, 100, 16)[0]
    index = TreeIndex.build(keys, keys)
    query = torch.zeros(1, 1, 16)
    assert cpu_boxes.supports(index.tree, query, index.settings.rules())
    rules = replace(index.settings, lost_mass=0.1).rules()
    assert not cpu_boxes.supports(index.tree, query, rules)


@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize(("lean", "first"), [(0.5, 16), (0.75, 16), (0.9, 0), (1.0, 0)])
def test_wide_box_is_ahead_of_a_narrow_one_where_the_upper_bound_counts_for_more(
    lean: float, first: int, is_compiled: bool
) -> None:
    wide = torch.tensor([5.0, -5.0]).repeat(8)
    keys = torch.zeros(1, 64, 16)
    keys[0, :, 0] = torch.cat([wide, torch.full((16,), 3.0), torch.full((32,), -9.0)])
    index = TreeIndex.build(keys, keys, leaf_tokens=16, lean=lean)
    query = torch.zeros(1, 1, 16)
    query[..., 0] = 1
    search = (cpu_boxes if is_compiled else box_search).search_boxes
    found = search(index.tree, query, 16, "max", index.settings.rules(), None)
    assert sorted(found.ids[0].tolist()) == list(range(first, first + 16))


@pytest.mark.parametrize("lean", [0.5, 0.75])
def test_boxes_of_single_tokens_are_ranked_alike_wherever_between_their_bounds(lean: float) -> None:
    keys, topics = topic_keys(2, 500, 32)
    indexes = [TreeIndex.build(keys, keys, leaf_tokens=1, lean=each) for each in (lean, 1.0)]
    for query in topic_queries(topics, 3, 4) * 0.3:
        found, expected = (index.search(query, 200).ids for index in indexes)
        assert torch.equal(found, expected)
