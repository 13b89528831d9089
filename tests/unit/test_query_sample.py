"""Which queries of a prompt are kept."""

import pytest
import torch

from offload.sparse.queries import QuerySample


def numbered(start: int, stop: int) -> torch.Tensor:
    """Queries of two heads, whose first coordinate is their position."""
    positions = torch.arange(start, stop, dtype=torch.float32)
    return torch.stack([positions, positions]).unsqueeze(-1)


@pytest.mark.parametrize("total", [5, 8, 9, 100, 1023])
@pytest.mark.parametrize("piece", [1, 7, 64, 2000])
def test_kept_queries_do_not_depend_on_the_pieces(piece: int, total: int) -> None:
    whole, parts = QuerySample(8), QuerySample(8)
    whole.add("layer", numbered(0, total))
    for start in range(0, total, piece):
        parts.add("layer", numbered(start, min(total, start + piece)))
    a, b = whole.get("layer", 2), parts.get("layer", 2)
    assert a is not None
    assert b is not None
    assert torch.equal(a, b)
    assert min(total, 8) <= a.shape[1] <= 16
    steps = a[0, 1:, 0] - a[0, :-1, 0]
    assert len(set(steps.tolist())) == 1


def test_heads_of_a_group_are_kept_together() -> None:
    sample = QuerySample(4)
    sample.add(0, torch.arange(4.0).repeat_interleave(3).view(4, 3, 1))
    found = sample.get(0, 2)
    assert found is not None
    assert [set(row.flatten().tolist()) for row in found] == [{0.0, 1.0}, {2.0, 3.0}]


def test_nothing_is_kept_unless_asked_for() -> None:
    sample = QuerySample(0)
    sample.add(0, numbered(0, 9))
    assert sample.get(0, 2) is None
    assert sample.num_bytes == 0
