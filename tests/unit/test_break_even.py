"""Short contexts are read as a whole where that is asked for, and the choice stays as it was."""

import pytest
import torch

from offload.errors import ConfigError
from offload.presets import customised
from offload.sparse.break_even import BreakEven
from offload.types import ChunkLayout

LAYOUT = ChunkLayout(2, 16, 64, 64, torch.float32)


def break_even(dense_below: object) -> BreakEven:
    preset = customised("adaptive", dense_below=dense_below)  # type: ignore[arg-type]
    assert preset.sparse is not None
    return BreakEven(preset.sparse, LAYOUT, torch.device("cpu"))


def test_a_number_of_tokens_is_taken_as_it_is() -> None:
    found = break_even(5000)
    assert found.is_dense(4999, 8)
    assert not found.is_dense(5000, 8)


def test_by_default_no_length_is_too_short() -> None:
    preset = customised("adaptive")
    assert preset.sparse is not None
    assert not BreakEven(preset.sparse, LAYOUT, torch.device("cpu")).is_dense(1, 8)


def test_a_measured_length_divides_short_from_long_and_stays() -> None:
    found = break_even("auto")
    answers = [found.is_dense(length, 8) for length in (1, 1 << 10, 1 << 20, (1 << 20) + 1)]
    assert answers[0]
    assert answers == sorted(answers, reverse=True)
    assert not answers[-1]
    assert answers == [found.is_dense(length, 8) for length in (1, 1 << 10, 1 << 20, (1 << 20) + 1)]


@pytest.mark.parametrize("wrong", [-1, True])
def test_what_is_no_length_is_refused(wrong: object) -> None:
    with pytest.raises(ConfigError, match="dense_below"):
        break_even(wrong)
