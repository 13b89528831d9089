import pytest
import torch
from torch import Tensor

from offload.errors import ConfigError
from offload.index.graph_build import as_queries_see, build_graph, nearest_keys
from offload.index.graph_settings import GraphSettings
from offload.index.orphans import attach_orphans, reachable


def random_rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def far_apart(num_keys: int) -> Tensor:
    """Keys in two places that no distance criterion would link."""
    keys = random_rows(num_keys, 16)
    keys[num_keys // 2 :] += 1000
    return keys


def with_huge_key(num_keys: int) -> Tensor:
    keys = random_rows(num_keys, 16)
    keys[3] *= 1e4
    return keys


SHAPES = {
    "spread": lambda: random_rows(700, 16),
    "more than a block": lambda: random_rows(4500, 16),
    "equal": lambda: random_rows(1, 16).repeat(700, 1),
    "zeros": lambda: torch.zeros(700, 16),
    "far apart": lambda: far_apart(700),
    "one huge": lambda: with_huge_key(700),
    "two": lambda: random_rows(2, 16),
    "one": lambda: random_rows(1, 16),
}


@pytest.mark.parametrize("degree", [1, 2, 16])
@pytest.mark.parametrize("name", SHAPES)
def test_graph_of_any_keys_has_valid_edges_and_a_way_to_every_key(name: str, degree: int) -> None:
    keys = SHAPES[name]()
    graph = build_graph(keys, random_rows(50, 16, seed=1), GraphSettings(degree=degree))
    edges = graph.neighbours
    assert edges.shape == (len(keys), degree)
    assert int(edges.min()) >= -1
    assert int(edges.max()) < len(keys)
    assert not bool((edges == torch.arange(len(keys)).unsqueeze(1)).any())
    ordered = edges.sort(1).values
    assert not bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any())
    assert bool(reachable(edges, graph.entries).all())


def test_graph_of_one_query_has_a_way_to_every_key() -> None:
    graph = build_graph(random_rows(700, 16), random_rows(1, 16, seed=1), GraphSettings())
    assert bool(reachable(graph.neighbours, graph.entries).all())


def test_entries_are_the_keys_that_most_queries_find() -> None:
    keys = random_rows(700, 16)
    query = random_rows(1, 16, seed=1)
    keys[[5, 300]] = 20 * query
    queries = query + 0.1 * random_rows(40, 16, seed=2)
    graph = build_graph(keys, queries, GraphSettings(num_nearest=2, num_entries=2))
    assert sorted(graph.entries.tolist()) == [5, 300]


def test_same_input_gives_the_same_graph() -> None:
    keys, queries = random_rows(900, 16), random_rows(60, 16, seed=1)
    graphs = [build_graph(keys, queries, GraphSettings()) for _ in range(2)]
    assert torch.equal(graphs[0].neighbours, graphs[1].neighbours)
    assert torch.equal(graphs[0].entries, graphs[1].entries)


def test_distance_of_rows_as_queries_see_them_is_how_much_logits_differ() -> None:
    keys, queries = random_rows(20, 8), random_rows(5000, 8, seed=1) * torch.arange(1, 9) + 7
    rows = as_queries_see(keys, queries)
    logits = (queries - queries.mean(0)) @ keys.mT
    differ = (logits.unsqueeze(2) - logits.unsqueeze(1)).square().mean(0).sqrt()
    torch.testing.assert_close(torch.cdist(rows, rows), differ, rtol=0.1, atol=1e-3)


@pytest.mark.parametrize("num_queries", [1, 3000])
def test_nearest_keys_are_those_with_the_largest_inner_products(num_queries: int) -> None:
    keys, queries = random_rows(9000, 8), random_rows(num_queries, 8, seed=1)
    found = nearest_keys(queries[-1:], keys, 5)
    assert torch.equal(found[0], (keys @ queries[-1]).topk(5).indices)
    assert torch.equal(nearest_keys(queries, keys, 5)[-1:], found)


def test_orphans_without_any_edges_follow_one_another() -> None:
    rows = torch.tensor([[0.0], [9.0], [1.0], [8.0], [2.0]])
    nothing, entries = torch.full((5, 0), -1), torch.tensor([0, 1])
    edges = attach_orphans(nothing, rows, entries)
    assert edges.squeeze(1).tolist() == [2, 3, 4, -1, -1]


def test_attaching_orphans_keeps_edges_and_adds_none_where_none_is_needed() -> None:
    edges = torch.tensor([[1, -1], [2, 0], [-1, -1]])
    attached = attach_orphans(edges, torch.eye(3), torch.tensor([0, -1]))
    assert torch.equal(attached[:, :2], edges)
    assert bool((attached[:, 2] == -1).all())


@pytest.mark.parametrize("name", ["beam", "width", "degree", "max_queries", "segment_tokens"])
def test_graph_setting_below_one_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=0"):
        GraphSettings(**{name: 0})
