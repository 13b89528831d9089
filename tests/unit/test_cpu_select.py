"""The largest are chosen as sorting would choose them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("numba", reason="compiled kernels need numba")
from offload.kernels.cpu_select import best, cut_at

numbers = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False) | st.sampled_from(
    [0.0, -0.0]
)
scores = st.lists(numbers | st.just(float("-inf")), min_size=1, max_size=200)


@given(scores, st.data())
def test_the_best_scores_are_found_once_each(values: list[float], data: st.DataObject) -> None:
    array = np.array(values, np.float32) + np.float32(0)  # one zero
    count = data.draw(st.integers(1, len(values)))
    places, ranks = best(array, count)
    assert len(set(places.tolist())) == count
    assert sorted(places.tolist()) == places.tolist()
    assert sorted(ranks.tolist()) == list(range(count))
    assert sorted(array[places].tolist()) == sorted(array.tolist())[-count:]


@given(st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=200))
def test_ranks_are_exact_to_a_thousandth_of_the_range(values: list[float]) -> None:
    array = np.array(values, np.float32)
    places, ranks = best(array, len(array))
    in_order = array[places[np.argsort(ranks)]]
    allowed = (float(array.max()) - float(array.min())) / 1000 + 1e-6
    assert bool((np.diff(in_order) <= allowed).all())


@given(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 300)), min_size=1, max_size=100),
    st.integers(1, 40_000),
)
def test_a_cut_leaves_what_weighs_enough(pairs: list[tuple[int, int]], wanted: int) -> None:
    keys = np.array([key for key, _ in pairs], np.uint32)
    weights = np.array([weight for _, weight in pairs], np.int16)
    key, remaining = cut_at(keys, weights, wanted)
    above = int(weights[keys > key].sum())
    assert above < wanted
    assert remaining == wanted - above
    assert above + int(weights[keys == key].sum()) >= min(wanted, int(weights.sum()))
