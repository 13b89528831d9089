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
from offload.presets import PRESETS, Preset, customised
from offload.recall_data import build_document, is_correct
from offload.recall_model import load_recall_model
from offload.sparse.builder import IndexBuilder, Job
from offload.sparse.segments import SegmentSizes
from tests.support.generation import decode, prompt
from tests.support.models import make_model, tight_capacity

TIERS = ("gpu", "cpu", "disk")
SIZE = 16
SPARSE = [name for name, preset in PRESETS.items() if preset.sparse is not None]
INDEXED = [name for name in SPARSE if name != "streaming"]


def small(policy: str, budget: float | int | None = None, **changes: Any) -> Preset:
    """Let a policy read sparsely in a context of a thousand tokens."""
    own = {"budget": budget, "sink_tokens": 4, "window_tokens": 64, "dense_layers": 0}
    return customised(policy, **(own | changes))


def sparse_cache(
    model: Any, tmp_path: Path, policy: str, budget: float | int, rows: int = 1
) -> OffloadedCache:
    return OffloadedCache(
        TIERS,
        policy=small(policy, budget),
        capacity={**tight_capacity(model, rows, SIZE), "disk": 1 << 27},
        disk_path=tmp_path,
        chunk_tokens=SIZE,
        config=model.config,
    )


def check_every_call(cache: OffloadedCache) -> None:
    preset = cache._core.config.preset
    assert preset.sparse is not None
    checked = replace(preset, sparse=replace(preset.sparse, check_every=1))
    object.__setattr__(cache._core.config, "preset", checked)


@torch.no_grad()
def logits(model: Any, cache: Any, ids: Tensor) -> list[Tensor]:
    model(ids, past_key_values=cache)
    return list(decode(model, cache, prompt(ids.shape[0], 3, seed=4)).logits)


@pytest.mark.leaks
@pytest.mark.parametrize(
    ("policy", "architecture"),
    [
        *((policy, "llama") for policy in SPARSE),
        # What an architecture does with its attention is the same for all policies.
        *(("adaptive", name) for name in ("gpt_neox", "gemma3", "falcon_h1")),
    ],
)
def test_everything_read_gives_the_logits_of_dynamic_cache(
    policy: str, architecture: str, tmp_path: Path
) -> None:
    rows = 2 if policy == "adaptive" else 1
    model, ids = make_model(architecture, "eager"), prompt(rows, 400).repeat(1, 3)
    expected = logits(model, DynamicCache(config=model.config), ids)
    with sparse_cache(model, tmp_path, policy, 1.0, rows=rows) as cache:
        found = logits(model, cache, ids)
        assert (cache.stats().retrieved_tokens > 0) == (policy in INDEXED)
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
    with sparse_cache(model, tmp_path, "adaptive", budget) as cache, torch.no_grad():
        check_every_call(cache)
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
        ("adaptive", float("nan"), "budget=nan"),
        ("adaptive", True, "budget=True"),
        ("adaptive", "1%", "budget='1%'"),
        ("streaming", -1, "budget=-1"),
        ("clever", 0.1, "known: exact"),
    ],
)
def test_budget_that_is_none_is_refused_with_what_would_do(
    policy: str, budget: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        OffloadedCache(TIERS, policy=policy, budget=budget, disk_path=tmp_path)


@pytest.mark.leaks
def test_streaming_reads_nothing_between_sinks_and_window(tmp_path: Path) -> None:
    model = make_model("llama", "eager")
    with sparse_cache(model, tmp_path, "streaming", 160) as cache, torch.no_grad():
        model(prompt(1, 1400), past_key_values=cache)
        model(prompt(1, 1, seed=5), past_key_values=cache)  # what the prefill had begun to load
        before = {name: tier.loaded_bytes for name, tier in cache.stats().tiers.items()}
        decode(model, cache, prompt(1, 1, seed=4), steps=20)
        after = {name: tier.loaded_bytes for name, tier in cache.stats().tiers.items()}
    chunk_bytes = cache_chunk_bytes(model)
    window_chunks = -(-160 // SIZE) + 2
    steps, layers = 21, model.config.num_hidden_layers
    assert sum(after.values()) - sum(before.values()) <= (
        window_chunks * chunk_bytes * steps * layers
    )


def cache_chunk_bytes(model: Any) -> int:
    config = model.config
    heads, dim = config.num_key_value_heads, config.head_dim
    return int(2 * heads * dim * SIZE * 4)


@pytest.mark.leaks
@pytest.mark.parametrize("policy", ["adaptive", "retrieval_attention"])
def test_streaming_heads_are_neither_read_nor_indexed(policy: str, tmp_path: Path) -> None:
    model = make_model("llama", "eager")
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    pattern = [[head > 0 for head in range(heads)] for _ in range(layers)]
    sizes = []
    for streaming in (None, pattern):
        cache = OffloadedCache(
            TIERS,
            policy=small(policy, 1.0, streaming_heads=streaming),
            capacity={**tight_capacity(model, 1, SIZE), "disk": 1 << 27},
            disk_path=tmp_path,
            chunk_tokens=SIZE,
        )
        with cache, torch.no_grad():
            model(prompt(1, 1400), past_key_values=cache)
            decode(model, cache, prompt(1, 3, seed=4))
            stats = cache.stats()
            sizes.append((stats.retrieved_tokens, stats.index_bytes))
            cache.check_integrity()
    assert sizes[1][0] * heads == sizes[0][0]
    assert sizes[1][1] < sizes[0][1]


@pytest.mark.leaks
def test_all_heads_streaming_equals_the_streaming_policy(tmp_path: Path) -> None:
    model = make_model("llama", "eager")
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    found = []
    # Of 87 whole chunks the index leaves the first one and, after one segment of 64, the last 22.
    for policy in (
        small("quest", 1.0, streaming_heads=[[True] * heads] * layers),
        small("streaming", 22 * SIZE),
    ):
        with (
            OffloadedCache(TIERS, policy=policy, disk_path=tmp_path, chunk_tokens=SIZE) as cache,
            torch.no_grad(),
        ):
            model(prompt(1, 87 * SIZE + 2), past_key_values=cache)
            found.append(decode(model, cache, prompt(1, 3, seed=4), steps=4).logits)
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < 1e-4


@pytest.mark.leaks
def test_error_target_reads_as_much_as_it_takes(tmp_path: Path) -> None:
    model, tokenizer = load_recall_model()
    document = build_document(4096, 8, seed=3)
    reader, facts = Reader(model, tokenizer, document, 1024), choose_facts(document, 4, seed=3)
    shares = []
    for target in (0.3, 0.03):
        with OffloadedCache(
            TIERS, policy="adaptive", error=target, budget=0.2, disk_path=tmp_path
        ) as cache:
            prefill(model, cache, torch.tensor([document.token_ids]), 1024, lambda count: None)
            for fact in facts:
                fork = cache.fork()
                assert is_correct(fact, reader.ask(fork, fact))
                fork.close()
            stats = cache.stats()
        shares.append(stats.retrieved_tokens / stats.covered_tokens)
    assert shares[0] < shares[1] / 2
    assert 0 < shares[1] < 0.2


@pytest.mark.leaks
@pytest.mark.parametrize("policy", ["adaptive", "quest"])
def test_padding_is_hidden_and_the_rest_is_read_sparsely(policy: str, tmp_path: Path) -> None:
    model, ids = make_model("llama", "eager"), prompt(2, 1400)
    mask = torch.ones(2, 1400, dtype=torch.bool)
    mask[1, :100] = False

    def run(cache: Any) -> list[Tensor]:
        grown, out = mask.clone(), []
        with torch.no_grad():
            model(ids, past_key_values=cache, attention_mask=grown.long())
            for step in range(4):
                grown = torch.cat([grown, torch.ones(2, 1, dtype=torch.bool)], 1)
                token = prompt(2, 1, seed=step)
                position = grown.sum(1, keepdim=True) - 1
                result = model(
                    token,
                    past_key_values=cache,
                    attention_mask=grown.long(),
                    position_ids=position,
                )
                out.append(result.logits)
        return out

    expected = run(DynamicCache())
    with sparse_cache(model, tmp_path, policy, 1.0, rows=2) as cache:
        found = run(cache)
        stats = cache.stats()
    assert stats.retrieved_tokens == stats.covered_tokens > 0
    for a, b in zip(expected, found, strict=True):
        assert (a - b).abs().max() < 1e-4


@pytest.mark.leaks
@pytest.mark.parametrize("policy", INDEXED)
def test_index_that_grew_and_was_compacted_equals_one_built_at_once(
    policy: str, tmp_path: Path
) -> None:
    model, ids, chosen = make_model("llama", "eager"), prompt(1, 2300), small(policy, 40)
    assert chosen.sparse is not None
    # What a projection learns from changes as a prompt goes on; without queries it uses the keys.
    plan = replace(chosen.sparse, sizes=SegmentSizes((1024, 256)), kept_queries=0)
    chosen = replace(chosen, sparse=plan)
    with (
        OffloadedCache(TIERS, policy=chosen, disk_path=tmp_path, chunk_tokens=SIZE) as cache,
        torch.no_grad(),
    ):
        for piece in ids.split(115, 1):  # too many queries to be read sparsely
            model(piece, past_key_values=cache)
            fork = cache.fork()
            decode(model, fork, prompt(1, 1, seed=9), steps=1)
            fork.close()
        decode(model, cache, prompt(1, 1, seed=9), steps=1)
        runtime = cache._core.runtime
        assert runtime is not None
        assert runtime.engine.retrieval is not None
        indexes = runtime.engine.retrieval.indexes
        assert indexes is not None
        builder = IndexBuilder(runtime.engine.store, torch.device("cpu"))
        assert len(indexes._joined) == len(runtime.layers)
        for segments, grown in indexes._joined.items():
            assert [len(segment) * SIZE for segment in segments] == [1024, *[256] * 4]
            heads = tuple(range(model.config.num_key_value_heads))
            recipe = plan.recipe(runtime.engine.store.table[segments[0][0]].info.layer)
            assert recipe is not None
            parts = [builder.finish(Job(segment, heads, recipe)) for segment in segments]
            fresh = type(grown).join(parts)
            assert fresh.meta() == grown.meta()
            for name, tensor in fresh.tensors().items():
                assert torch.equal(tensor, grown.tensors()[name]), name
        cache.check_integrity()


@pytest.mark.parametrize(
    ("policy", "changes", "message"),
    [
        ("exact", {"error": 0.1}, "takes no error"),
        ("quest", {"error": 0.1}, "cannot tell how far off"),
        ("streaming", {"error": 0.1}, "cannot tell how far off"),
        ("adaptive", {"error": 0.0}, "error=0.0"),
        ("adaptive", {"error": 2}, "error=2"),
        ("adaptive", {"dense_layers": -1}, "dense_layers=-1"),
        ("exact", {"tail": None}, "takes no has_tail"),
    ],
)
def test_changes_that_a_policy_cannot_have_are_refused(
    policy: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        customised(policy, **changes)


def test_without_a_tail_what_is_not_read_is_forgotten() -> None:
    plan = customised("adaptive", tail=None, dense_layers=1, budget=7).sparse
    assert plan is not None
    assert (plan.has_tail, plan.dense_layers, plan.budget) == (False, 1, 7)
