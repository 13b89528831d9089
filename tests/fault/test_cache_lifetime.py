"""Caches that are closed, dropped, forked, shared between threads, or asked for the impossible."""

import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from offload import (
    ClosedError,
    ConfigError,
)
from tests.support.disk import WAIT_S
from tests.support.small_caches import (
    CAPACITY,
    SLOT_BYTES,
    check_continues,
    check_nothing_left,
    check_sound,
    draw_ids,
    expected_tokens,
    generate,
    make_cache,
    make_llama,
    plain_after,
    step,
)


def test_use_after_close_raises_closed_error_and_close_twice_is_fine(tmp_path: Path) -> None:
    cache = make_cache(tmp_path)
    step(cache, draw_ids(1, 60))
    cache.close()
    cache.close()
    check_nothing_left(tmp_path / "disk")
    with pytest.raises(ClosedError, match="closed"):
        step(cache, draw_ids(1, 1))
    with pytest.raises(ClosedError):
        cache.reset()
    with pytest.raises(ClosedError):
        copy.deepcopy(cache)
    assert "OffloadedCache" in repr(cache)


def test_unused_cache_leaves_nothing_behind(tmp_path: Path) -> None:
    make_cache(tmp_path).close()
    check_nothing_left(tmp_path / "disk")


def test_cache_that_nobody_refers_to_is_closed(tmp_path: Path) -> None:
    # That threads and descriptors are gone as well is checked around every test of this folder.
    cache = make_cache(tmp_path)
    step(cache, draw_ids(1, 60))
    del cache
    gc.collect()
    check_nothing_left(tmp_path / "disk")


def test_fork_that_is_dropped_while_another_one_steps_waits_for_nobody(tmp_path: Path) -> None:
    # The collector runs on any thread, that of a disk read included, which a step may wait for.
    with make_cache(tmp_path) as cache:
        step(cache, draw_ids(1, 60))
        fork = cache.fork()
        assert cache._core.runtime is not None
        with cache._core.runtime.engine.lock, ThreadPoolExecutor(1) as collector:
            collector.submit(fork._core.abandon).result(WAIT_S)
        assert cache._core.is_shared
        step(cache, draw_ids(1, 1))
        assert not cache._core.is_shared
        cache.check_integrity()


def test_caches_that_are_dropped_together_are_closed(tmp_path: Path) -> None:
    caches = [make_cache(tmp_path)]
    step(caches[0], draw_ids(1, 60))
    caches += [caches[0].fork(), caches[0].fork()]
    caches.clear()
    gc.collect()
    check_nothing_left(tmp_path / "disk")


def test_two_caches_on_two_threads_give_the_tokens_they_give_alone(tmp_path: Path) -> None:
    prompts = [draw_ids(2, 50, seed=5), draw_ids(1, 70, seed=6)]
    with (
        ThreadPoolExecutor(2) as executor,
        make_cache(tmp_path) as first,
        make_cache(tmp_path) as second,
    ):
        running = [
            executor.submit(generate, cache, ids)
            for cache, ids in zip([first, second], prompts, strict=True)
        ]
        found = [future.result(WAIT_S) for future in running]
    for tokens, ids in zip(found, prompts, strict=True):
        assert torch.equal(tokens, expected_tokens(ids))


def test_forks_on_two_threads_go_their_own_ways(tmp_path: Path) -> None:
    shared, capacity = draw_ids(1, 50), {**CAPACITY, "gpu": 24 * SLOT_BYTES}
    endings = [draw_ids(1, 9, seed=7), draw_ids(1, 20, seed=8)]
    prompts = [torch.cat([shared, ending], 1) for ending in endings]
    with make_cache(tmp_path, capacity=capacity) as cache:
        step(cache, shared)
        with copy.deepcopy(cache) as fork, ThreadPoolExecutor(2) as executor:
            running = [
                executor.submit(generate, branch, ids)
                for branch, ids in zip([cache, fork], prompts, strict=True)
            ]
            found = [future.result(WAIT_S) for future in running]
        check_sound(cache, prompts[0].shape[1] + 11)
    for tokens, ids in zip(found, prompts, strict=True):
        assert torch.equal(tokens, expected_tokens(ids))
    check_nothing_left(tmp_path / "disk")


@pytest.mark.parametrize("first", [0, 1])
def test_fork_survives_the_other_one(tmp_path: Path, first: int) -> None:
    ids, capacity = draw_ids(1, 50), {**CAPACITY, "gpu": 24 * SLOT_BYTES}
    cache = make_cache(tmp_path, capacity=capacity)
    step(cache, ids)
    branches = [cache, copy.deepcopy(cache)]
    branches.pop(first).close()
    with branches[0] as left:
        check_continues(left, plain_after(ids))
    check_nothing_left(tmp_path / "disk")


def test_attention_weights_are_those_of_dynamic_cache_under_eager(tmp_path: Path) -> None:
    model, ids, plain = make_llama(attn_implementation="eager"), draw_ids(2, 60), DynamicCache()
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    with make_cache(tmp_path) as cache, torch.no_grad():
        for start, stop in ((0, 50), (50, 60)):
            piece = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
            ours = model(**piece, past_key_values=cache, output_attentions=True)
            stock = model(**piece, past_key_values=plain, output_attentions=True)
            for found, expected in zip(ours.attentions, stock.attentions, strict=True):
                seen = mask[:, start:stop].bool()[:, None].expand(-1, found.shape[1], -1)
                torch.testing.assert_close(found[seen], expected[seen], atol=1e-6, rtol=0)


def test_attention_dropout_in_training_mode_is_refused(tmp_path: Path) -> None:
    model = make_llama(attention_dropout=0.1)
    model.train()
    with make_cache(tmp_path) as cache, pytest.raises(ConfigError, match=r"dropout 0\.1 .*eval"):
        model(draw_ids(1, 8), past_key_values=cache)


def test_forward_that_records_gradients_gives_the_logits_of_dynamic_cache(tmp_path: Path) -> None:
    ids, plain = draw_ids(1, 60), DynamicCache()
    model = make_llama()
    with make_cache(tmp_path) as cache:
        for piece in (ids[:, :37], ids[:, 37:38], ids[:, 38:]):
            found = model(piece, past_key_values=cache).logits
            expected = model(piece, past_key_values=plain).logits
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
