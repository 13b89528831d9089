"""Looking a layer ahead through real models: much is foreseen, nothing changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload import ConfigError, OffloadedCache
from offload.lookahead import look_ahead
from offload.prefill import prefill
from offload.presets import customised
from offload.recall_data import build_document
from offload.recall_model import load_recall_model
from offload.runtime import Runtime
from offload.sparse.row_reader import RowReader
from tests.support.generation import decode, prompt
from tests.support.models import make_model, tight_capacity

SIZE = 16
STEPS = 5


def sparse_cache(
    model: Any, tmp_path: Path, *, rows: int = 1, host: int = 1 << 19, **changes: Any
) -> OffloadedCache:
    """Make a cache of which most lies on the disk, unless the host is large."""
    tight = tight_capacity(model, rows, SIZE)
    return OffloadedCache(
        ["gpu", "cpu", "disk"],
        policy=customised("adaptive", budget=40, window_tokens=64),
        capacity={"gpu": tight["gpu"], "cpu": host, "disk": 1 << 27},
        disk_path=tmp_path,
        chunk_tokens=SIZE,
        config=model.config,
        **changes,
    )


def runtime_of(cache: OffloadedCache) -> Runtime:
    assert cache._core.runtime is not None
    return cache._core.runtime


def anticipated(cache: OffloadedCache) -> int:
    return runtime_of(cache).engine.counters.anticipated_rows


def rows_of(cache: OffloadedCache) -> RowReader:
    rows = runtime_of(cache).engine.rows
    assert rows is not None
    return rows


@pytest.mark.leaks
def test_look_ahead_foresees_most_of_what_is_chosen_and_changes_no_bit(tmp_path: Path) -> None:
    model, _ = load_recall_model()
    document = build_document(3072, 20, seed=3)
    question = torch.tensor([document.question(document.facts[3])])
    cache = OffloadedCache(
        ["gpu", "cpu", "disk"],
        policy="adaptive",
        capacity={"gpu": "2MiB", "cpu": "8MiB", "disk": "64MiB"},
        disk_path=tmp_path,
    )
    with cache:
        prefill(model, cache, torch.tensor([document.token_ids]), 1024, lambda count: None)
        with cache.fork() as fork:
            plain = torch.stack(list(decode(model, fork, question, STEPS).logits))
        counters = runtime_of(cache).engine.counters
        assert counters.line_lookups > counters.anticipated_rows == 0
        with look_ahead(model, cache):
            ahead = torch.stack(list(decode(model, cache, question, STEPS).logits))
        cache.check_integrity()
    assert torch.equal(plain, ahead)
    assert 0.5 * counters.foreseeable_rows < counters.foreseen_rows < counters.foreseeable_rows


@pytest.mark.leaks
def test_look_ahead_follows_crops_and_rows_that_change_places(tmp_path: Path) -> None:
    model, ids = make_model("llama"), prompt(2, 1400)
    found = []
    for looks_ahead in (False, True):
        with sparse_cache(model, tmp_path, rows=2) as cache, torch.no_grad():
            ahead = look_ahead(model, cache)
            if not looks_ahead:
                ahead.remove()
            model(ids, past_key_values=cache)
            logits = list(decode(model, cache, prompt(2, 1, seed=4), STEPS).logits)
            cache.crop(-5 * SIZE)
            before = anticipated(cache)
            logits += decode(model, cache, prompt(2, 1, seed=5), steps=1).logits
            assert anticipated(cache) == before  # layers have to be searched again first
            logits += decode(model, cache, prompt(2, 1, seed=6), STEPS).logits
            cache.batch_select_indices(torch.tensor([1, 1]))
            logits += decode(model, cache, prompt(2, 1, seed=7), STEPS).logits
            found.append(torch.stack(logits))
            assert (anticipated(cache) > 0) == looks_ahead
            ahead.remove()
            cache.check_integrity()
    assert torch.equal(*found)


@pytest.mark.leaks
def test_look_ahead_acts_on_single_tokens_of_its_own_cache_only(tmp_path: Path) -> None:
    model = make_model("llama")
    with sparse_cache(model, tmp_path, rows=2) as cache, torch.no_grad():
        with look_ahead(model, cache):
            model(prompt(1, 1400), past_key_values=cache)
            model(prompt(1, 3, seed=4), past_key_values=cache)
            with cache.fork() as fork:
                decode(model, fork, prompt(1, 1, seed=5), STEPS)
            assert anticipated(cache) == 0
            model(prompt(1, 1, seed=6), past_key_values=cache)
            once = anticipated(cache)
        decode(model, cache, prompt(1, 1, seed=7), STEPS)
        assert anticipated(cache) == once > 0


def test_layer_that_was_never_searched_is_not_indexed_for_a_look_ahead(tmp_path: Path) -> None:
    model = make_model("llama")
    with sparse_cache(model, tmp_path) as cache, torch.no_grad(), look_ahead(model, cache):
        model(prompt(1, 1400), past_key_values=cache)
        model(prompt(1, 1, seed=4), past_key_values=cache)
        assert anticipated(cache) == 0
        model(prompt(1, 1, seed=5), past_key_values=cache)
        assert anticipated(cache) > 0


@pytest.mark.leaks
def test_reads_for_the_next_layer_are_under_way_before_this_one_attends(tmp_path: Path) -> None:
    model, flying = make_model("llama"), []
    with sparse_cache(model, tmp_path) as cache, torch.no_grad(), look_ahead(model, cache):
        model(prompt(1, 1400), past_key_values=cache)
        decode(model, cache, prompt(1, 1, seed=4), STEPS)
        rows_of(cache).settle()
        note = model.model.layers[0].register_forward_pre_hook(
            lambda layer, args: flying.append(rows_of(cache).num_flying)
        )
        model(prompt(1, 1, seed=5), past_key_values=cache)
        note.remove()
    assert flying[0] > 0


@pytest.mark.leaks
def test_nothing_further_is_searched_for_while_everything_is_in_memory(tmp_path: Path) -> None:
    model = make_model("llama")
    found = []
    for tiers in (["gpu", "cpu"], ["gpu", "cpu", "disk"]):
        with (
            OffloadedCache(
                tiers,
                policy=customised("adaptive", budget=40),
                capacity=dict.fromkeys(tiers, 1 << 24),
                chunk_tokens=SIZE,
                disk_path=tmp_path if "disk" in tiers else None,
            ) as cache,
            look_ahead(model, cache),
            torch.no_grad(),
        ):
            model(prompt(1, 1400), past_key_values=cache)
            found.append(torch.stack(list(decode(model, cache, prompt(1, 1), STEPS).logits)))
            assert cache.stats().retrieved_tokens > 0
            assert anticipated(cache) == 0
    # Bits would differ if tokens had been found that were then left out.
    assert torch.equal(*found)


@pytest.mark.leaks
def test_rows_just_below_the_cut_are_fetched_for_the_next_step(tmp_path: Path) -> None:
    model = make_model("llama")
    with sparse_cache(model, tmp_path) as cache, torch.no_grad():
        model(prompt(1, 1400), past_key_values=cache)
        model(prompt(1, 1, seed=4), past_key_values=cache)
        rows_of(cache).settle()
        lookups = runtime_of(cache).engine.counters.line_lookups
        assert lookups < rows_of(cache).num_used_lines


def logits_of(model: Any, cache: OffloadedCache, ids: Tensor) -> Tensor:
    found: Tensor = model(ids, past_key_values=cache).logits
    return found


@pytest.mark.leaks
def test_rows_that_were_late_are_there_when_they_are_asked_for_again(tmp_path: Path) -> None:
    model, token = make_model("llama"), prompt(1, 1, seed=4)
    with sparse_cache(model, tmp_path, host=1 << 20, max_wait_us=0) as cache, torch.no_grad():
        model(prompt(1, 1400), past_key_values=cache)
        counters = runtime_of(cache).engine.counters
        late, answers = [], []
        for _ in range(20):
            before = counters.late_rows
            answers.append(logits_of(model, cache, token))
            late.append(counters.late_rows - before)
            cache.crop(-1)
            rows_of(cache).settle()
    with sparse_cache(model, tmp_path, host=1 << 20) as cache, torch.no_grad():
        model(prompt(1, 1400), past_key_values=cache)
        patient = logits_of(model, cache, token)
    assert late[0] > late[-1] == 0
    assert torch.equal(answers[-1], patient)
    assert not torch.equal(answers[0], patient)


@pytest.mark.parametrize("max_wait_us", [-1, float("nan"), "soon", True])
def test_wait_that_is_none_is_refused(max_wait_us: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"max_wait_us={max_wait_us!r}"):
        OffloadedCache(
            ["gpu", "disk"], policy="adaptive", max_wait_us=max_wait_us, disk_path=tmp_path
        )


def test_exact_policy_takes_no_limit_on_the_wait(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="takes no max_wait_us"):
        OffloadedCache(["gpu", "disk"], max_wait_us=100, disk_path=tmp_path)
