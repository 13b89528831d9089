"""Which layer deserves how much of a tier."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import ConfigError
from offload.tiers.layer_shares import layer_preference, layer_shares, slots_by_layer


def test_preference_is_the_product_of_entropy_and_variance_to_their_powers() -> None:
    rows = torch.tensor([[0.9, 0.1], [0.5, 0.5]])
    entropy = -(0.7 * math.log(0.7) + 0.3 * math.log(0.3))
    assert layer_preference(rows) == pytest.approx(entropy * 2 * 0.04)
    assert layer_preference(rows, 2.0, 0.5) == pytest.approx(entropy**0.5 * 0.08**2)


def test_attention_that_is_spread_and_moves_is_preferred() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 64, generator=generator)
    spread, narrow = (logits * scale for scale in (2.0, 30.0))
    narrow = narrow[:1].expand(32, -1)
    assert layer_preference(spread.softmax(-1)) > 10 * layer_preference(narrow.softmax(-1))


@pytest.mark.parametrize(
    "rows",
    [torch.full((4, 8), 0.125), torch.eye(8)[:1].expand(4, -1), torch.zeros(4, 8)],
    ids=["uniform and still", "one chunk", "nothing"],
)
def test_attention_that_gains_nothing_from_room_is_worth_nothing(rows: torch.Tensor) -> None:
    assert layer_preference(rows) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("shape", [(8,), (0, 8), (2, 2, 2)])
def test_rows_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="num_queries, num_chunks"):
        layer_preference(torch.ones(shape))


@pytest.mark.parametrize("temperatures", [(0.0, 1.0), (1.0, -1.0)])
def test_temperatures_that_are_not_positive_are_refused(temperatures: tuple[float, float]) -> None:
    with pytest.raises(ConfigError, match="temperatures"):
        layer_preference(torch.ones(2, 2), *temperatures)


@pytest.mark.parametrize(
    ("preferences", "least", "expected"),
    [
        ([1.0, 3.0], 0.0, [0.25, 0.75]),
        ([1.0, 3.0], 0.5, [0.375, 0.625]),
        ([0.0, 0.0], 0.0, [0.5, 0.5]),
        ([0.0, 2.0], 1.0, [0.5, 0.5]),
        ([], 0.0, []),
    ],
)
def test_shares_are_in_proportion_to_preferences_above_the_least(
    preferences: list[float], least: float, expected: list[float]
) -> None:
    assert layer_shares(preferences, least) == pytest.approx(expected)


@pytest.mark.parametrize("preference", [-1.0, math.nan, math.inf])
def test_preferences_that_are_none_are_refused(preference: float) -> None:
    with pytest.raises(ConfigError, match="preferences"):
        layer_shares([1.0, preference])


def test_least_out_of_range_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"1\.5 of an equal share"):
        layer_shares([1.0], 1.5)


@given(
    preferences=st.lists(st.floats(0, 1e6), min_size=1, max_size=40), num_slots=st.integers(0, 9999)
)
def test_slots_add_up_and_are_within_one_of_the_exact_share(
    preferences: list[float], num_slots: int
) -> None:
    shares = layer_shares(preferences)
    slots = slots_by_layer(shares, num_slots)
    assert sum(slots) == num_slots
    assert all(
        abs(count - share * num_slots) < 1 + 1e-6
        for count, share in zip(slots, shares, strict=True)
    )


@pytest.mark.parametrize(("shares", "num_slots"), [([], 3), ([1.0], -1)])
def test_slots_that_cannot_be_divided_are_refused(shares: list[float], num_slots: int) -> None:
    with pytest.raises(ConfigError, match="cannot be divided"):
        slots_by_layer(shares, num_slots)
