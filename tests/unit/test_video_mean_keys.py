"""What a question is compared with."""

import pytest
import torch

from offload.video.mean_keys import MeanKeys, means_of
from offload.video.retrieval import coverage_of

HEADS, DIM = 2, 4


@pytest.mark.parametrize("sizes", [[3, 3, 3], [1, 5, 3], [9]])
def test_mean_of_each_unit_is_that_of_its_tokens(sizes: list[int]) -> None:
    keys = torch.randn(HEADS, 9, DIM)
    expected = torch.stack([part.mean(1) for part in keys.split(sizes, 1)])
    torch.testing.assert_close(means_of(keys, sizes), expected)


def test_mean_keys_grow_and_shrink_like_a_list() -> None:
    means, rows = MeanKeys(), torch.randn(40, HEADS, DIM)
    for start in range(0, 40, 7):
        means.extend(rows[start : start + 7])
    assert torch.equal(means.first(100), rows)
    means.truncate(5)
    means.extend(rows[20:22])
    assert len(means) == 7
    assert torch.equal(means.first(7), torch.cat([rows[:5], rows[20:22]]))


def test_coverage_of_all_units_is_one_and_of_none_nothing() -> None:
    query, means = torch.randn(4, 3, DIM), torch.randn(6, HEADS, DIM)
    assert coverage_of(query, means, 0.5, range(6)) == pytest.approx(1)
    assert coverage_of(query, means, 0.5, []) == 0


def test_coverage_is_the_share_of_attention_that_units_get() -> None:
    query, means = torch.randn(4, 3, DIM), torch.randn(6, HEADS, DIM)
    shares = [coverage_of(query, means, 0.5, [unit]) for unit in range(6)]
    keys = means.repeat_interleave(2, 1).transpose(0, 1)
    expected = (query @ keys.transpose(1, 2) * 0.5).softmax(-1).mean((0, 1))
    torch.testing.assert_close(torch.tensor(shares), expected)
