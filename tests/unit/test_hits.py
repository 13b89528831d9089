"""The first of the tokens that a search found."""

import torch

from offload.index.base import Hits


def test_first_hits_of_each_head_are_kept_and_no_more_than_there_are() -> None:
    hits = Hits(torch.tensor([[4, 2, 9], [1, 7, -1]]), 0)

    assert hits.first(torch.tensor([2, 0])).ids.tolist() == [[4, 2], [-1, -1]]
    # An error target asks for a quarter more than it needs, which may be more than was found.
    assert hits.first(torch.tensor([3, 5])).ids.tolist() == [[4, 2, 9], [1, 7, -1]]
