"""Which frames a question is answered from."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import ConfigError
from offload.video.retrieval import REKV, Mode, RetrievalPlan, chosen, scores_of


@given(
    st.sampled_from(["tokmax", "rekv", "recent", "uniform"]),
    st.integers(1, 12),
    st.integers(0, 4),
    st.integers(1, 40),
    st.integers(0, 2**31),
)
def test_chosen_units_are_as_many_as_wanted_in_order_and_exist(
    mode: Mode, num_units: int, recent: int, total: int, seed: int
) -> None:
    plan = RetrievalPlan(mode, num_units, min(recent, num_units))
    scores = torch.rand(total, generator=torch.Generator().manual_seed(seed))
    found = chosen(plan, scores, total)
    assert found == sorted(set(found))
    assert set(found) <= set(range(total))
    assert len(found) == min(num_units, total)


def test_last_units_are_among_the_chosen_whatever_their_scores() -> None:
    scores = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0])
    assert chosen(RetrievalPlan("tokmax", 4, 2), scores, 6) == [0, 1, 4, 5]
    assert chosen(RetrievalPlan("rekv", 4, 0), scores, 6) == [0, 1, 2, 3]


def test_uniform_units_span_the_stream() -> None:
    assert chosen(RetrievalPlan("uniform", 3, 0), None, 9) == [0, 4, 8]
    assert chosen(RetrievalPlan("uniform", 1, 0), None, 9) == [0]


def test_rekv_scores_are_products_of_the_mean_query_with_mean_keys_of_all_heads() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(6, 5, 8, generator=generator)
    means = torch.randn(7, 3, 8, generator=generator)
    wanted = torch.zeros(7)
    for head in range(6):
        wanted += means[:, head // 2] @ query[head].mean(0)
    torch.testing.assert_close(scores_of("rekv", query, means, 0.5), wanted)


def test_tokmax_finds_a_unit_that_one_token_of_one_head_asks_for() -> None:
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(50, 2, 16, generator=generator) * 0.1
    query = torch.randn(4, 20, 16, generator=generator) * 0.1
    means[17, 1] = 3.0
    query[3, 11] = 3.0
    assert scores_of("tokmax", query, means, 0.25)[17] > 0.99
    assert scores_of("tokmax", query[:, :11], means, 0.25).max() < 0.1


@pytest.mark.parametrize(("units", "recent"), [(0, 0), (4, 5), (4, -1)])
def test_impossible_numbers_of_units_are_refused(units: int, recent: int) -> None:
    with pytest.raises(ConfigError, match=f"{units} units with {recent} of the last"):
        RetrievalPlan("tokmax", units, recent)


@pytest.mark.parametrize("mode", ["oracle", "external"])
def test_mode_that_is_told_needs_somebody_who_tells(mode: Mode) -> None:
    with pytest.raises(ConfigError, match="needs to be told"):
        RetrievalPlan(mode)


def test_published_preset_leaves_the_recent_window_out() -> None:
    assert (REKV.mode, REKV.num_units, REKV.num_recent) == ("rekv", 64, 0)
