import math

import pytest
import torch

from offload.index.base import Combine
from offload.index.candidates import best_of_group


def test_share_of_a_query_s_softmax_counts_not_its_logit() -> None:
    sure_of_one, torn_between_two = [9.0, 0.0], [500.0, 500.0]
    ids = torch.tensor([[[1, 2], [3, 4]]])
    best = best_of_group(ids, torch.tensor([[sure_of_one, torn_between_two]]), 3)
    assert best.tolist() == [[1, 3, 4]]


def test_token_that_several_queries_found_counts_once_with_its_largest_share() -> None:
    ids = torch.tensor([[[7, 2, 5], [2, 7, 6]]])
    scores = torch.tensor([[[5.0, 1.0, 0.0], [4.0, 2.0, 1.0]]])
    assert best_of_group(ids, scores, 4).tolist() == [[7, 2, 6, 5]]


@pytest.mark.parametrize("budget", [0, 1, 2, 9])
def test_heads_that_found_fewer_are_filled_up(budget: int) -> None:
    ids = torch.tensor([[[3, -1, -1]], [[8, 9, 1]], [[-1, -1, -1]]])
    scores = torch.tensor([[[1.0, -math.inf, -math.inf]], [[3.0, 2.0, 1.0]], [[-math.inf] * 3]])
    best = best_of_group(ids, scores, budget)
    expected = torch.tensor([[3, -1, -1], [8, 9, 1], [-1, -1, -1]])[:, :budget]
    assert torch.equal(best, expected)


@pytest.mark.parametrize("group", ["max", "sum"])
def test_tokens_far_behind_the_best_are_kept_in_their_order(group: Combine) -> None:
    ids = torch.tensor([[[4, 6, 5, -1], [4, 5, -1, -1]]])
    scores = torch.tensor([[[900.0, 100.0, 300.0, -math.inf], [900.0, 300.0] + [-math.inf] * 2]])
    assert best_of_group(ids, scores, 9, group)[0].tolist() == [4, 5, 6, -1, -1, -1, -1, -1]


def test_nothing_found_gives_nothing() -> None:
    assert (
        best_of_group(torch.empty(2, 3, 0, dtype=torch.int64), torch.empty(2, 3, 0), 5).numel() == 0
    )
