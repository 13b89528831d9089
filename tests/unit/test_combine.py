"""How the queries of a group agree on what to read."""

import torch

from offload.index.base import combine_group
from offload.index.candidates import best_of_group

# One query is almost sure of the first key, three others like the second one a little better.
LOGITS = torch.tensor([[[5.0, 0.0, 0.0], [0.0, 0.8, 0.0], [0.0, 0.8, 0.0], [0.0, 0.8, 0.0]]])


def test_largest_share_follows_the_query_that_is_surest() -> None:
    assert combine_group(LOGITS, "max").argmax(1).tolist() == [0]


def test_sum_of_shares_follows_the_group() -> None:
    assert combine_group(LOGITS[:, [0, 1, 1, 1, 1]], "sum").argsort(
        1, descending=True
    ).tolist() == [[1, 0, 2]]


def test_shares_do_not_depend_on_what_is_added_to_all_logits_of_a_query() -> None:
    moved = LOGITS + torch.tensor([100.0, -50.0, 0.0, 7.0]).view(1, 4, 1)
    for group in ("max", "sum"):
        torch.testing.assert_close(combine_group(moved, group), combine_group(LOGITS, group))


def test_candidates_are_combined_like_scores_of_all_keys() -> None:
    ids = torch.arange(3).expand(1, 5, 3)
    scores = LOGITS[:, [0, 1, 1, 1, 1]]
    assert best_of_group(ids, scores, 3, "sum").tolist() == [[1, 0, 2]]
    assert best_of_group(ids, scores, 1, "max").tolist() == [[0]]
