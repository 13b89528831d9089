import pytest
import torch
from torch import Tensor

from offload.index.graph_build import Graph, build_graph
from offload.index.graph_search import Found, best_first
from offload.index.graph_settings import GraphSettings


def random_rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def search(keys: Tensor, graphs: list[Graph], query: Tensor, beam: int, *, width: int = 2) -> Found:
    """Search with queries ``[num_heads, num_queries, dim]``."""
    return best_first(
        query.flatten(0, 1),
        keys,
        torch.stack([graph.neighbours for graph in graphs]),
        torch.stack([graph.entries for graph in graphs]),
        torch.arange(len(keys)).repeat_interleave(query.shape[1]),
        beam=beam,
        width=width,
    )


def graphs_over(keys: Tensor) -> list[Graph]:
    queries = random_rows(1000, keys.shape[2], seed=9)
    return [build_graph(rows, queries, GraphSettings()) for rows in keys]


@pytest.mark.parametrize("width", [1, 2, 7, 300])
def test_beam_of_all_keys_finds_them_all_in_order_and_compares_each_once(width: int) -> None:
    keys, query = random_rows(2, 300, 16), random_rows(2, 3, 16, seed=1)
    found = search(keys, graphs_over(keys), query, 300, width=width)
    wanted = torch.bmm(query, keys.mT).flatten(0, 1).sort(descending=True, stable=True)
    torch.testing.assert_close(found.scores, wanted.values)
    assert torch.equal(found.ids, wanted.indices)
    assert found.num_compared == found.num_expanded == 6 * 300


def test_short_beam_compares_few_keys_and_finds_most_of_the_best() -> None:
    keys, query = random_rows(1, 4000, 16), random_rows(1, 20, 16, seed=1)
    found = search(keys, graphs_over(keys), query, 100)
    best = torch.bmm(query, keys.mT)[0].topk(10).indices
    recall = (found.ids.unsqueeze(2) == best.unsqueeze(1)).any(1).float().mean()
    assert float(recall) > 0.9
    assert found.num_compared < 20 * 4000 / 4


def test_every_query_is_compared_with_the_keys_of_its_own_head() -> None:
    keys, query = random_rows(3, 300, 16), random_rows(3, 2, 16, seed=1)
    graphs = graphs_over(keys)
    together = search(keys, graphs, query, 50).ids.view(3, 2, 50)
    for head in range(3):
        alone = search(keys[head : head + 1], graphs[head : head + 1], query[head : head + 1], 50)
        assert torch.equal(together[head], alone.ids)


def test_edges_and_entries_that_repeat_give_no_key_twice() -> None:
    keys, query = random_rows(1, 5, 16), random_rows(1, 1, 16, seed=1)
    edges = torch.tensor([[1, 1, 2], [0, 0, 3], [1, 3, 4], [3, 3, 3], [0, 1, 2]])
    found = search(keys, [Graph(edges.int(), torch.tensor([0, 0, 1]).int())], query, 5)
    assert sorted(found.ids[0].tolist()) == [0, 1, 2, 3, 4]
    assert found.num_compared == 5


def test_keys_without_a_way_to_them_leave_places_empty() -> None:
    keys, query = random_rows(1, 5, 16), random_rows(1, 1, 16, seed=1)
    edges = torch.tensor([[1, -1], [0, -1], [3, 4], [2, 4], [2, 3]])
    found = search(keys, [Graph(edges.int(), torch.tensor([0, -1]).int())], query, 4)
    assert sorted(found.ids[0].tolist()) == [-1, -1, 0, 1]
    assert bool(torch.isinf(found.scores[found.ids < 0]).all())


def test_equal_keys_are_all_found() -> None:
    keys = random_rows(1, 1, 16).repeat(1, 300, 1)
    found = search(keys, graphs_over(keys), random_rows(1, 2, 16, seed=1), 300)
    for ids in found.ids:
        assert sorted(ids.tolist()) == list(range(300))
