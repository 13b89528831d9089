"""Sparse policies through real models: everything read is exact, little read is close."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from offload import ConfigError, OffloadedCache
from offload.demo import Reader, choose_facts, kv_bytes, small_capacity
from offload.prefill import prefill
from offload.presets import PRESETS
from offload.recall_data import build_document, is_correct
from offload.recall_model import load_recall_model
from tests.support.generation import decode, prompt
from tests.support.models import make_model, tight_capacity

TIERS = ("gpu", "cpu", "disk")
SIZE = 16
SPARSE = [name for name, preset in PRESETS.items() if preset.sparse is not None]


def sparse_cache(
    model: Any, tmp_path: Path, policy: str, budget: float | int, rows: int = 1
) -> OffloadedCache:
    return OffloadedCache(
        TIERS,
        policy=policy,
        budget=budget,
        capacity={**tight_capacity(model, rows, SIZE), "disk": 1 << 27},
        disk_path=tmp_path,
        chunk_tokens=SIZE,
        config=model.config,
    )


@torch.no_grad()
def logits(model: Any, cache: Any, ids: Tensor) -> list[Tensor]:
    model(ids, past_key_values=cache)
    return list(decode(model, cache, prompt(ids.shape[0], 3, seed=4)).logits)


@pytest.mark.leaks
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt_neox", "gemma3", "falcon_h1"])
@pytest.mark.parametrize("policy", SPARSE)
def test_everything_read_gives_the_logits_of_dynamic_cache(
    policy: str, architecture: str, tmp_path: Path
) -> None:
    model, ids = make_model(architecture, "eager"), prompt(2, 400)
    expected = logits(model, DynamicCache(config=model.config), ids.repeat(1, 3))
    with sparse_cache(model, tmp_path, policy, 1.0, rows=2) as cache:
        found = logits(model, cache, ids.repeat(1, 3))
        assert cache.stats().retrieved_tokens > 0
        cache.check_integrity()
    for a, b in zip(expected, found, strict=True):
        assert (a - b).abs().max() < 1e-4


@pytest.mark.leaks
@pytest.mark.parametrize("policy", SPARSE)
def test_fork_and_crop_of_a_sparse_cache_read_their_own_tokens(policy: str, tmp_path: Path) -> None:
    model, ids = make_model("llama"), prompt(1, 1400)
    with sparse_cache(model, tmp_path, policy, 1.0, rows=3) as cache, torch.no_grad():
        model(ids, past_key_values=cache)
        fork = cache.fork()
        fork.crop(-300)
        found = list(decode(model, fork, prompt(1, 3, seed=4)).logits)
        fork.close()
    expected = logits(model, DynamicCache(), ids[:, :-300])
    for a, b in zip(expected, found, strict=True):
        assert (a - b).abs().max() < 1e-4


def test_adaptive_answers_from_four_tokens_in_a_thousand(tmp_path: Path) -> None:
    model, tokenizer = load_recall_model()
    document = build_document(8192, 8, seed=3)
    reader, facts = Reader(model, tokenizer, document, 1024), choose_facts(document, 4, seed=3)
    with OffloadedCache(
        TIERS,
        policy="adaptive",
        budget=0.004,
        capacity=small_capacity(kv_bytes(model, 8192)) | {"disk": "1GiB"},
        disk_path=tmp_path,
    ) as cache:
        prefill(model, cache, torch.tensor([document.token_ids]), 1024, lambda count: None)
        for fact in facts:
            fork = cache.fork()
            assert is_correct(fact, reader.ask(fork, fact))
            fork.close()
        stats = cache.stats()
    assert 0 < stats.retrieved_tokens <= 0.005 * stats.covered_tokens


@pytest.mark.leaks
@pytest.mark.parametrize("budget", [1.0, 0.02])
def test_self_check_measures_the_error_of_what_was_answered(budget: float, tmp_path: Path) -> None:
    model = make_model("llama")
    preset = PRESETS["adaptive"]
    assert preset.sparse is not None
    with sparse_cache(model, tmp_path, "adaptive", budget) as cache, torch.no_grad():
        plan = replace(preset.sparse, budget=budget, check_every=1)
        object.__setattr__(cache._core.config, "preset", replace(preset, sparse=plan))
        model(prompt(1, 1400), past_key_values=cache)
        decode(model, cache, prompt(1, 3, seed=4), steps=20)
        stats = cache.stats()
        cache.check_integrity()
    assert stats.num_checks > 3
    assert stats.error_median < (1e-4 if budget == 1.0 else 0.5)
    assert budget == 1.0 or stats.error_p95 > 1e-4


@pytest.mark.parametrize(
    ("policy", "budget", "message"),
    [
        ("exact", 0.1, "takes no budget"),
        ("adaptive", 0.0, "budget=0.0"),
        ("adaptive", 1.5, "budget=1.5"),
        ("adaptive", -3, "budget=-3"),
        ("adaptive", True, "budget=True"),
        ("adaptive", "1%", "budget='1%'"),
        ("clever", 0.1, "known: exact"),
    ],
)
def test_budget_that_is_none_is_refused_with_what_would_do(
    policy: str, budget: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        OffloadedCache(TIERS, policy=policy, budget=budget, disk_path=tmp_path)
