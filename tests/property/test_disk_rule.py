"""Chunks on disk are read if they may be among the best, and only then."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offload.index.chunks import best_tokens
from offload.index.disk_rule import choose_with_disk


@st.composite
def shelves(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    """Draw scores (many of them equal), lengths, what is on disk, and a budget."""
    heads, count = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    rows = st.lists(st.integers(-3, 3), min_size=count, max_size=count)
    scores = torch.tensor([draw(rows) for _ in range(heads)], dtype=torch.float32)
    places = st.lists(st.booleans(), min_size=count, max_size=count)
    on_disk = torch.tensor([draw(places) for _ in range(heads)])
    lengths = torch.tensor(draw(st.lists(st.integers(1, 5), min_size=count, max_size=count)))
    return scores, lengths, on_disk, draw(st.integers(0, 2 * int(lengths.sum())))


@given(shelves())
def test_with_everything_looked_at_the_choice_is_that_of_a_flat_ranking(
    shelf: tuple[Tensor, Tensor, Tensor, int],
) -> None:
    scores, lengths, on_disk, budget = shelf
    found = choose_with_disk(scores, lengths, on_disk, budget)
    assert torch.equal(found.ids, best_tokens(scores, lengths, budget))


@given(shelves(), st.floats(0, 2))
def test_chunks_on_disk_are_wanted_if_they_reach_the_worst_that_memory_would_keep(
    shelf: tuple[Tensor, Tensor, Tensor, int], over: float
) -> None:
    scores, lengths, on_disk, budget = shelf
    found = choose_with_disk(scores, lengths, on_disk, budget)
    for head in range(len(scores)):
        order = sorted(
            (i for i in range(len(lengths)) if not on_disk[head, i]), key=lambda i: -scores[head, i]
        )
        tokens, least = 0, -math.inf
        for i in order:
            tokens += int(lengths[i])
            if tokens >= budget:
                least = float(scores[head, i])
                break
        assert float(found.least[head]) == least
        assert torch.equal(found.wanted[head], on_disk[head] & (scores[head] >= least))
    fewer = choose_with_disk(scores, lengths, on_disk, budget, over)
    assert bool((fewer.wanted <= found.wanted).all())
    read = fewer.ids[fewer.ids >= 0]
    assert len(read) <= found.ids.numel()


def test_of_the_chunks_on_disk_only_the_best_are_wanted_where_that_is_limited() -> None:
    scores, lengths = torch.tensor([[1.0, 5.0, 4.0, 3.0]]), torch.tensor([2, 2, 2, 2])
    on_disk = torch.tensor([[False, True, True, True]])
    found = choose_with_disk(scores, lengths, on_disk, 2, over=2.0)
    assert found.wanted.tolist() == [[False, True, True, False]]
    assert found.ids.tolist() == [[2, 3]]
