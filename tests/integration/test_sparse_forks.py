"""What forks of a sparse cache share, and what becomes of it."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import pytest
import torch
from torch import Tensor

from offload import OffloadedCache
from offload.index.clusters import ClusterIndex
from offload.presets import customised
from offload.sparse.plan import IndexRecipe
from tests.support.generation import decode, prompt
from tests.support.models import make_model

SIZE = 16
BUILDS: Counter[int] = Counter()


@dataclass(frozen=True, slots=True)
class CountedIndex(ClusterIndex):
    """Counts what is built, by its length."""

    @classmethod
    def build(cls, keys: Tensor, values: Tensor, **options: Any) -> Self:
        BUILDS[keys.shape[1]] += 1
        return super(CountedIndex, cls).build(keys, values, **options)


@pytest.fixture
def cache(tmp_path: Path) -> Any:
    BUILDS.clear()
    preset = customised("retroinfer", budget=64)
    assert preset.sparse is not None
    plan = replace(preset.sparse, index=IndexRecipe(CountedIndex))
    with OffloadedCache(
        ["gpu", "cpu", "disk"],
        policy=replace(preset, sparse=plan),
        disk_path=tmp_path,
        chunk_tokens=SIZE,
    ) as cache:
        yield cache


def ask(model: Any, cache: OffloadedCache, num_tokens: int = 3, steps: int = 3) -> list[Tensor]:
    fork = cache.fork()
    found = list(decode(model, fork, prompt(1, num_tokens, seed=num_tokens), steps).logits)
    fork.close()
    return found


@pytest.mark.leaks
def test_questions_on_forks_build_each_index_once(cache: OffloadedCache) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model(prompt(1, 3000), past_key_values=cache)
        first, second = ask(model, cache), ask(model, cache)
    layers = model.config.num_hidden_layers
    assert {1024: 2 * layers} == BUILDS
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    cache.check_integrity()


@pytest.mark.leaks
def test_a_fork_that_grew_and_closed_leaves_the_common_part(cache: OffloadedCache) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model(prompt(1, 1400), past_key_values=cache)
        before = ask(model, cache)
        size = cache.stats().index_bytes
        fork = cache.fork()
        model(prompt(1, 1200, seed=7), past_key_values=fork)
        decode(model, fork, prompt(1, 3, seed=5), steps=2)
        assert cache.stats().index_bytes > size
        fork.close()
        after = ask(model, cache)
    assert cache.stats().index_bytes == size
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert {1024: 2 * model.config.num_hidden_layers} == BUILDS


@pytest.mark.leaks
def test_index_of_a_cache_that_grows_is_held_once(cache: OffloadedCache) -> None:
    model, sizes = make_model("llama"), []
    with torch.no_grad():
        for piece in prompt(1, 7000).split(1000, 1):
            model(piece, past_key_values=cache)
            decode(model, cache, prompt(1, 1, seed=5), steps=1)
            sizes.append(cache.stats().index_bytes)
    runtime = cache._core.runtime
    assert runtime is not None
    retrieval = runtime.engine.retrieval
    assert retrieval is not None
    assert retrieval.indexes is not None
    retrieval.settle()
    joined = retrieval.indexes._joined.values()
    assert len(joined) == model.config.num_hidden_layers
    assert all(index.num_tokens == 6 * 1024 for index in joined)


@pytest.mark.leaks
def test_nothing_is_kept_once_the_tokens_are_gone(cache: OffloadedCache) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model(prompt(1, 1400), past_key_values=cache)
        ask(model, cache)
        assert cache.stats().index_bytes > 0
        cache.crop(-1370)
        model(prompt(1, 1400, seed=3), past_key_values=cache)
        ask(model, cache)
    assert {1024: 2 * model.config.num_hidden_layers} == BUILDS
    runtime = cache._core.runtime
    assert runtime is not None
    retrieval = runtime.engine.retrieval
    assert retrieval is not None
    assert retrieval.indexes is not None
    assert len(retrieval.indexes._joined) == model.config.num_hidden_layers
