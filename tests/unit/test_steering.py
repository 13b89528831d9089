"""Holding a bound on the error."""

import random

import pytest

from offload.sparse.steering import ErrorSteering


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_one_error_in_ten_ends_above_the_target_whatever_the_index_expects(scale: float) -> None:
    steering, draw = ErrorSteering(), random.Random(0)
    misses = []
    for _ in range(4000):
        error = scale * steering.factor * draw.lognormvariate(0, 0.5) * 0.05
        steering.observe(error, 0.05)
        misses.append(error > 0.05)
    assert 0.07 < sum(misses[1000:]) / 3000 < 0.13


def test_factor_stays_within_bounds() -> None:
    steering = ErrorSteering()
    for _ in range(1000):
        steering.observe(1.0, 0.01)
    assert 0.01 < steering.factor < 0.1
    for _ in range(1000):
        steering.observe(0.0, 0.01)
    assert 1 < steering.factor < 10
