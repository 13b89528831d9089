"""Every way to generate, on many architectures, through three tiers, against DynamicCache."""

from pathlib import Path

import pytest
from torch import Tensor
from transformers import Cache, DynamicCache

from offload import ConfigError, OffloadedCache
from tests.support.cells import (
    TIERS,
    Cell,
    compare,
    covering_cells,
    expected_outcome,
    refused_by_transformers,
    run_offloaded,
    used_tiers,
)
from tests.support.generation import generate, prompt
from tests.support.models import ARCHITECTURES, UNSUPPORTED, make_model
from tests.support.modes import MODES

_MAX_LOGIT_ERROR = 1e-4
"""Rounding reaches 1e-5 on logits of standard deviation 1; one lost key gives 1e-2 and more."""


@pytest.mark.parametrize("cell", list(covering_cells()), ids=str)
def test_generate_through_three_tiers_gives_the_tokens_of_dynamic_cache(
    cell: Cell, tmp_path: Path
) -> None:
    expected = expected_outcome(cell.architecture, cell.attention, cell.mode)
    found, stats = run_offloaded(cell, tmp_path)
    comparison = compare(expected, found)
    assert comparison.same_tokens, f"logits differ by up to {comparison.logit_error}"
    assert comparison.logit_error <= _MAX_LOGIT_ERROR
    wanted = set(TIERS) if ARCHITECTURES[cell.architecture].offloads else set()
    assert used_tiers(stats) == wanted


class _LossyCache(DynamicCache):
    """A DynamicCache that forgets the values of four tokens, as a lost chunk would."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: object, **kw: object
    ) -> tuple[Tensor, Tensor]:
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kw)
        if keys.shape[2] > 16:
            values = values.clone()
            values[:, :, 8:12] = 0
        return keys, values


@pytest.mark.parametrize("mode", MODES)
def test_comparison_with_a_cache_that_lost_four_tokens_finds_it(mode: str) -> None:
    model = make_model("qwen3")

    def make_cache() -> Cache:
        return _LossyCache(config=model.config)

    comparison = compare(expected_outcome("qwen3", "sdpa", mode), MODES[mode](model, make_cache))
    assert comparison.logit_error > 100 * _MAX_LOGIT_ERROR


@pytest.mark.parametrize(
    ("architecture", "mode"),
    [(a, m) for a in ARCHITECTURES for m in MODES if refused_by_transformers(a, "eager", m)],
)
def test_cell_left_out_of_the_matrix_is_refused_by_transformers_itself(
    architecture: str, mode: str
) -> None:
    with pytest.raises((ValueError, RuntimeError, AttributeError)):
        expected_outcome(architecture, "eager", mode)


@pytest.mark.parametrize("with_config", [False, True], ids=["learnt", "told"])
@pytest.mark.parametrize("architecture", UNSUPPORTED)
def test_generate_with_a_model_that_cannot_be_offloaded_is_refused(
    architecture: str, with_config: bool, tmp_path: Path
) -> None:
    model = make_model(architecture, "eager")
    with (
        pytest.raises((ConfigError, RuntimeError)),
        OffloadedCache(
            TIERS,
            capacity={"gpu": "1MiB", "cpu": "1MiB", "disk": "1GiB"},
            disk_path=tmp_path,
            chunk_tokens=8,
            config=model.config if with_config else None,
        ) as cache,
    ):
        generate(model, cache, input_ids=prompt(2, 20))


@pytest.mark.parametrize("mode", ["greedy_batch", "beams", "chunked_padded", "three_turns"])
@pytest.mark.parametrize(
    "tiers",
    [("gpu",), ("cpu",), ("disk",), ("gpu", "cpu"), ("gpu", "disk"), ("cpu", "disk")],
    ids="+".join,
)
def test_generate_on_some_of_the_tiers_gives_the_tokens_of_dynamic_cache(
    tiers: tuple[str, ...], mode: str, tmp_path: Path
) -> None:
    model = make_model("llama")
    made: list[OffloadedCache] = []

    def make_cache() -> Cache:
        path = tmp_path if "disk" in tiers else None
        capacity = dict.fromkeys(tiers, 1 << 22)
        made.append(OffloadedCache(tiers, capacity=capacity, disk_path=path, chunk_tokens=8))
        return made[-1]

    found = MODES[mode](model, make_cache)
    stats = made[0].stats()
    made[0].close()
    assert compare(expected_outcome("llama", "sdpa", mode), found).same_tokens
    assert used_tiers(stats) == {tiers[0]}
