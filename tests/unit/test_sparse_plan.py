"""Early layers have an index and a budget of their own."""

import pytest

from offload.index.bounds import BoundsIndex
from offload.presets import PRESETS, customised
from offload.sparse.plan import EarlyLayers, IndexRecipe, SparsePlan

EARLY, LATE = IndexRecipe(BoundsIndex, {"chunk_tokens": 8}), IndexRecipe(BoundsIndex)


@pytest.mark.parametrize(
    ("budget", "early_budget", "expected"),
    [(0.1, 0.5, (500, 500, 100)), (300, 0.1, (300, 300, 300)), (1.0, 0.5, (1000, 1000, 1000))],
)
def test_early_layers_read_their_own_budget_but_no_less_than_the_others(
    budget: float | int, early_budget: float, expected: tuple[int, ...]
) -> None:
    plan = SparsePlan(LATE, budget=budget, early=EarlyLayers(2, EARLY, early_budget))
    assert tuple(plan.tokens(1000, layer) for layer in range(3)) == expected
    assert plan.tokens(1000) == expected[-1]
    assert [plan.recipe(layer) for layer in range(3)] == [EARLY, EARLY, LATE]


def test_without_early_layers_all_are_alike() -> None:
    plan = SparsePlan(LATE, budget=0.1)
    assert {plan.tokens(1000, layer) for layer in range(3)} == {100}
    assert [plan.recipe(layer) for layer in range(3)] == [LATE] * 3


def test_leoam_reads_half_of_the_context_in_two_layers() -> None:
    plan = PRESETS["leoam"].sparse
    assert plan is not None
    assert [plan.tokens(10_000, layer) for layer in range(4)] == [5000, 5000, 1000, 1000]
    recipes = [plan.recipe(layer) for layer in (1, 2)]
    assert [recipe.options.get("leaf_tokens") for recipe in recipes if recipe] == [4, 4]
    more = customised("leoam", budget=0.8).sparse
    assert more is not None
    assert [more.tokens(10_000, layer) for layer in (1, 2)] == [8000, 8000]
