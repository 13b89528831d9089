"""Trees of boxes find what a flat ranking of all leaves finds, and look at fewer of them."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from offload.errors import ConfigError
from offload.index.base import Hits
from offload.index.best_first import best_first
from offload.index.bounds import BoundsIndex
from offload.index.boxes import BLOCK_LEAVES
from offload.index.tree import TreeIndex, TreeState
from offload.kernels.boxes import bounds
from tests.contracts.index_contract import random_rows
from tests.support.topic_keys import kept_mass, topic_keys, topic_queries

LEAF = 8


def state_of(hits: Hits) -> TreeState:
    assert isinstance(hits.state, TreeState)
    return hits.state


def whole_numbers(*shape: int, seed: int) -> Tensor:
    """Small ones, whose products are exact, so that bounds are too."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("num_levels", [1, 2, 3, 4])
@pytest.mark.parametrize("fanout", [2, 4])
@pytest.mark.parametrize("num_tokens", [1, 8, 63, 64, 333])
def test_best_first_order_is_that_of_all_leaves_sorted(
    num_tokens: int, fanout: int, num_levels: int
) -> None:
    keys, query = whole_numbers(1, num_tokens, 16, seed=0), whole_numbers(1, 1, 16, seed=1)
    options = {"leaf_tokens": LEAF, "fanout": fanout, "num_levels": num_levels}
    tree = TreeIndex.build(keys, keys, **options).tree
    scores = torch.cat([bounds(level, query)[0][0, 0] for level in tree.levels])
    leaves = scores[: tree.levels[0].num_nodes]
    order = list(best_first(tree, lambda node: float(scores[node])))
    assert order == leaves.argsort(descending=True, stable=True).tolist()


def test_best_first_looks_at_few_nodes_for_the_first_leaf() -> None:
    keys, query = random_rows(1, 4096, 16) / 10, random_rows(1, 1, 16, seed=1)
    keys[:, 2000] = 9 * query[:, 0]
    tree = TreeIndex.build(keys, keys, leaf_tokens=LEAF, num_levels=3).tree
    scores = torch.cat([bounds(level, query)[0][0, 0] for level in tree.levels])
    seen: list[int] = []

    def score(node: int) -> float:
        seen.append(node)
        return float(scores[node])

    assert next(best_first(tree, score)) == 2000 // LEAF
    assert len(seen) == 4096 // LEAF // 16 + 4 + 4


@pytest.mark.parametrize(("num_levels", "fanout"), [(2, 2), (2, 4), (3, 2), (3, 4)])
@pytest.mark.parametrize("group", ["max", "sum"])
def test_nothing_rejected_and_everything_looked_into_equals_the_flat_ranking(
    group: Any, num_levels: int, fanout: int
) -> None:
    keys, query = random_rows(2, 900, 32), random_rows(2, 4, 32, seed=1) / 3
    flat = BoundsIndex.build(keys, keys, chunk_tokens=LEAF).search(query, 90, group)
    # Just enough to look into everything, in rounds.
    tree = TreeIndex.build(
        keys, keys, leaf_tokens=LEAF, num_levels=num_levels, fanout=fanout, over=9.99
    )
    assert torch.equal(tree.search(query, 90, group).ids, flat.ids)


@pytest.mark.parametrize(
    ("num_levels", "over", "most_scored", "overlap"),
    [
        (2, 2.0, 0.61, 0.75),
        (2, 3.0, 0.66, 0.92),
        (3, 2.0, 0.41, 0.49),
        (3, 3.0, 0.49, 0.64),
        (4, 1.0, 0.22, 0.23),
        (4, 2.0, 0.31, 0.37),
        (4, 3.0, 0.40, 0.48),
    ],
)
def test_rounds_over_topics_agree_with_the_flat_ranking(
    num_levels: int, over: float, most_scored: float, overlap: float
) -> None:
    keys, topics = topic_keys(2, 32768, 128)
    queries, budget = topic_queries(topics, 6, 1, stay=0.0) * 0.3, 1632
    options = {"leaf_tokens": LEAF, "fanout": 2, "num_levels": num_levels, "over": over}
    tree = TreeIndex.build(keys, keys, **options)
    flat = BoundsIndex.build(keys, keys, chunk_tokens=LEAF)
    shares, masses = [], []
    for query in queries:
        hits, best = tree.search(query, budget), flat.search(query, budget)
        assert state_of(hits).num_scored <= most_scored * 2 * 32768 // LEAF
        shares += [torch.isin(a, b).float().mean() for a, b in zip(hits.ids, best.ids, strict=True)]
        masses.append(kept_mass(keys, query, hits.ids) - kept_mass(keys, query, best.ids))
    assert float(torch.stack(shares).mean()) >= overlap
    assert float(torch.cat(masses).mean()) > -0.01


@pytest.mark.parametrize("bits", [None, 8])
def test_scanned_bytes_are_those_of_the_boxes_that_were_looked_at(bits: int | None) -> None:
    keys = random_rows(2, 4096, 64)
    index = TreeIndex.build(keys, keys, leaf_tokens=LEAF, bits=bits, over=2.0)
    hits = index.search(random_rows(2, 1, 64, seed=1), 64)
    # 128 nodes at the top; of those as many are split as have twice the budget.
    num_scored = 2 * (128 + 4 * 4)
    assert state_of(hits).num_scored == num_scored
    if bits is None:
        assert hits.scanned_bytes == num_scored * 2 * 64 * 4
    else:
        scales = 2 * 2 * (4096 // LEAF // BLOCK_LEAVES) * 64 * 4
        assert hits.scanned_bytes == num_scored * 2 * 64 + scales


def test_large_budgets_are_found_by_scoring_all_leaves_and_nothing_else() -> None:
    keys, query = random_rows(2, 4096, 64), random_rows(2, 3, 64, seed=1) / 4
    hits = TreeIndex.build(keys, keys, leaf_tokens=LEAF).search(query, 820)
    assert state_of(hits).num_scored == 2 * 4096 // LEAF
    assert torch.equal(
        hits.ids, BoundsIndex.build(keys, keys, chunk_tokens=LEAF).search(query, 820).ids
    )


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("needle", [0, 7, 8, 31, 32, 511, 512, 999, 1000])
def test_key_at_the_end_of_a_leaf_or_in_a_short_last_one_is_found(
    needle: int, bits: int | None
) -> None:
    query = random_rows(2, 1, 32, seed=1)
    keys = random_rows(2, 1001, 32) / 10
    keys[:, needle] = 5 * query[:, 0]
    index = TreeIndex.build(keys, keys, leaf_tokens=LEAF, num_levels=3, bits=bits)
    found = index.search(query, LEAF).ids
    first = needle // LEAF * LEAF
    for row in found:
        assert row[: 1001 - first].tolist() == list(range(first, min(first + LEAF, 1001)))


def test_heads_of_a_layer_share_what_any_of_them_needs() -> None:
    query, keys = random_rows(3, 1, 32, seed=1), random_rows(3, 2000, 32) / 10
    for head, needle in enumerate((100, 900, 1700)):
        keys[head, needle] = 5 * query[head, 0]
    index = TreeIndex.build(keys, keys, leaf_tokens=LEAF, scope="layer")
    found = index.search(query, 64).ids
    assert bool((found == found[:1]).all())
    assert {100, 900, 1700} <= set(found[0].tolist())


def moving_search(
    index: TreeIndex, queries: Tensor, budget: int
) -> tuple[list[Hits], list[TreeState]]:
    hits: list[Hits] = []
    for query in queries:
        hits.append(index.search(query, budget, past=hits[-1] if hits else None))
    return hits, [state_of(found) for found in hits]


def test_frontier_follows_a_moving_query_and_forgets_where_it_was() -> None:
    keys, topics = topic_keys(2, 16384, 64)
    queries = topic_queries(topics, 60, 2) * 0.5
    options = {"leaf_tokens": LEAF, "num_levels": 3, "patience": 3}
    tree = TreeIndex.build(keys, keys, **options)
    flat = BoundsIndex.build(keys, keys, chunk_tokens=LEAF)
    hits, states = moving_search(tree, queries, 1024)
    kept, best = [], []
    for query, found in list(zip(queries, hits, strict=True))[20:]:
        kept.append(kept_mass(keys, query, found.ids))
        best.append(kept_mass(keys, query, flat.search(query, 1024).ids))
    assert torch.stack(kept).mean() > torch.stack(best).mean() - 0.01
    split = [state.frontier.num_split() for state in states if state.frontier is not None]
    assert any(later < earlier for earlier, later in itertools.pairwise(split))  # merges
    assert max(state.num_scored for state in states[20:]) < 2 * 16384 // LEAF


def test_nodes_are_whole_again_after_as_many_idle_steps_as_patience_has() -> None:
    keys, query = random_rows(1, 4096, 32) / 10, random_rows(1, 2, 32, seed=1)
    keys[:, 100], keys[:, 3000] = 9 * query[:, 0], 9 * query[:, 1]
    index = TreeIndex.build(keys, keys, leaf_tokens=LEAF, patience=3, over=1.0)
    parents = (100 // LEAF // 4, 3000 // LEAF // 4)
    asked = [query[:, :1]] * 2 + [query[:, 1:]] * 4
    _, states = moving_search(index, torch.stack(asked), LEAF)
    found = [
        tuple(int(state.frontier.split[1][0, parent]) for parent in parents)
        for state in states
        if state.frontier is not None
    ]
    assert [first > 0 for first, _ in found] == [True] * 4 + [False] * 2
    assert [second > 0 for _, second in found] == [False] * 2 + [True] * 4


def test_frontier_goes_on_in_an_index_that_has_grown() -> None:
    keys, topics = topic_keys(2, 12000, 64)
    queries = topic_queries(topics, 12, 2, stay=1.0) * 0.2
    options = {"leaf_tokens": LEAF, "over": 3.0, "patience": 6}
    lengths = [5003, 4000, 2997]
    parts = [TreeIndex.build(part, part, **options) for part in keys.split(lengths, 1)]
    past, state = None, None
    for step, query in enumerate(queries):
        index = TreeIndex.join(parts[: 1 + step // 4])
        past = index.search(query, 512, past=past)
        near, best = keys[:, : index.num_tokens], index.search(query, index.num_tokens).ids
        lost = kept_mass(near, query, best[:, :512]) - kept_mass(near, query, past.ids)
        assert float(lost.mean()) < 0.04
        state = state_of(past).frontier
        assert state is not None
        sizes = [level.num_nodes for level in index.tree.levels]
        assert [level.shape[1] for level in state.split] == sizes
    assert state is not None
    new = (lengths[0] + lengths[1]) // (LEAF * 4) + 1
    assert bool((state.split[1][:, new:] > 0).any())


def test_frontier_of_another_kind_of_tree_is_left_aside() -> None:
    keys, query = random_rows(2, 2000, 32), random_rows(2, 2, 32, seed=1)
    deep = TreeIndex.build(keys, keys, leaf_tokens=LEAF, num_levels=3, patience=3)
    plain = TreeIndex.build(keys, keys, leaf_tokens=LEAF, patience=3)
    past = deep.search(query, 100)
    assert torch.equal(plain.search(query, 100, past=past).ids, plain.search(query, 100).ids)


def test_search_leaves_the_frontier_that_it_began_with_as_it_was() -> None:
    keys, query = random_rows(2, 2000, 32), random_rows(5, 2, 2, 32, seed=1)
    index = TreeIndex.build(keys, keys, leaf_tokens=LEAF, patience=1)
    past = index.search(query[0], 100)
    frontier = state_of(past).frontier
    assert frontier is not None
    before = [level.clone() for level in (*frontier.split, frontier.slack)]
    for one in query[1:]:
        index.search(one, 100, past=past)
    for old, level in zip(before, (*frontier.split, frontier.slack), strict=True):
        assert torch.equal(old, level)


@pytest.mark.parametrize("lost_mass", [0.5, 0.1, 0.001])
@pytest.mark.parametrize("num_levels", [1, 3])
def test_certified_searches_lose_no_more_than_they_may(num_levels: int, lost_mass: float) -> None:
    query = random_rows(4, 3, 32, seed=1)
    query = 3 * query / query.norm(dim=-1, keepdim=True)
    keys = random_rows(4, 2000, 32) / 20
    for head, strength in enumerate((0.0, 2.0, 4.0, 6.0)):
        keys[head, 640:704] += strength * query[head].sum(0) / 3
    options = {"leaf_tokens": LEAF, "num_levels": num_levels, "lost_mass": lost_mass}
    hits = TreeIndex.build(keys, keys, **options).search(query, 300)
    certified = state_of(hits).certified
    lost = 1 - kept_mass(keys, query, hits.ids)
    assert certified.tolist()[0] is False
    assert certified.tolist()[-1] is True
    assert bool((lost[certified] <= lost_mass).all())
    # What is certified may be less than the budget; what is not takes all of it.
    assert bool(((hits.ids >= 0).sum(1)[~certified] == 300).all())
    assert bool(((hits.ids >= 0).sum(1) <= 300).all())


def test_no_search_is_certified_unless_that_is_asked_for() -> None:
    keys, query = random_rows(2, 500, 32), random_rows(2, 2, 32, seed=1)
    assert not state_of(TreeIndex.build(keys, keys).search(query, 500)).certified.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"leaf_tokens": 0}, "leaves of 0 tokens"),
        ({"fanout": 1}, "fan-out of 1"),
        ({"num_levels": 0}, "0 levels"),
        ({"leaf_tokens": 1024, "fanout": 8, "num_levels": 3}, "nodes of 65536 tokens"),
        ({"bits": 4}, "bits=4"),
        ({"scope": "model"}, "scope='model'"),
        ({"over": 0.5}, "over=0.5"),
        ({"patience": 0}, "patience=0"),
        ({"lost_mass": 1.0}, "lost_mass=1.0"),
        ({"lost_mass": math.nan}, "lost_mass=nan"),
    ],
    ids=str,
)
def test_settings_that_make_no_tree_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TreeIndex.build(random_rows(1, 9, 8), random_rows(1, 9, 8), **options)
