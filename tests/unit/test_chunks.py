"""Chunks cover their tokens, and the best are taken whole until the budget."""

import pytest
import torch
from torch import Tensor

from offload.errors import ConfigError
from offload.index.chunks import Chunking, best_tokens, per_chunk


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ([(5,)], [2, 2, 1]),
        ([(4,), (3,)], [2, 2, 2, 1]),
        ([(3,), (3,)], [2, 1, 2, 1]),
        ([(3, 1), (2,), (2,)], [2, 1, 1, 2, 2]),
    ],
    ids=str,
)
def test_joined_runs_keep_only_the_cuts_that_whole_chunks_do_not_hide(
    runs: list[tuple[int, ...]], expected: list[int]
) -> None:
    joined = Chunking.join([Chunking(2, run) for run in runs])
    assert joined.lengths(torch.device("cpu")).tolist() == expected
    assert joined.num_tokens == sum(expected)


def test_joined_runs_of_whole_chunks_equal_one_run() -> None:
    assert Chunking.join([Chunking(2, (4,)), Chunking(2, (6,)), Chunking(2, (1,))]) == Chunking(
        2, (11,)
    )


def test_chunks_without_tokens_are_refused() -> None:
    with pytest.raises(ConfigError, match="chunk_tokens=0"):
        Chunking(0, (5,))


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 9])
def test_per_chunk_summarises_every_chunk_and_the_short_last_one(num_tokens: int) -> None:
    rows = torch.arange(2.0 * num_tokens * 3).view(2, num_tokens, 3)
    sums = per_chunk(rows, 4, lambda chunks: chunks.sum(2))
    expected = torch.stack([chunk.sum(1) for chunk in rows.split(4, 1)], 1)
    assert torch.equal(sums, expected)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (0, []),
        (1, [4]),
        (3, [4, 0, 1]),
        (5, [4, 0, 1, 2, 5]),
        (7, [4, 0, 1, 2, 5, 6, 3]),
        (99, [4, 0, 1, 2, 5, 6, 3]),
    ],
)
def test_best_chunks_are_taken_whole_and_the_last_from_its_first_token(
    budget: int, expected: list[int]
) -> None:
    lengths: Tensor = torch.tensor([3, 1, 1, 2])
    scores = torch.tensor([[2.0, -5.0, 7.0, 1.0]])
    assert best_tokens(scores, lengths, budget).tolist() == [expected]


def test_best_chunks_of_each_head_are_its_own() -> None:
    lengths = torch.tensor([2, 2])
    scores = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert best_tokens(scores, lengths, 3).tolist() == [[2, 3, 0], [0, 1, 2]]
