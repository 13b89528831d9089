"""LeoAM's preset through real models: early layers, the frontier between steps, recall."""

from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from offload import OffloadedCache
from offload.demo import Reader, choose_facts, kv_bytes, small_capacity
from offload.index.base import Combine, Hits
from offload.index.tree import TreeIndex
from offload.prefill import prefill
from offload.presets import PRESETS, Preset, customised
from offload.recall_data import build_document, is_correct
from offload.recall_model import load_recall_model
from offload.sparse.plan import IndexRecipe
from tests.support.generation import decode, prompt
from tests.support.models import make_model

TIERS = ("gpu", "cpu", "disk")
SIZE = 16


class WatchedIndex(TreeIndex):
    """Notes what each search could go on from."""

    seen: ClassVar[list[Hits | None]] = []

    def search(
        self, query: Tensor, budget: int, group: Combine = "max", past: Hits | None = None
    ) -> Hits:
        self.seen.append(past)
        return super().search(query, budget, group, past)


def watched() -> Preset:
    preset = customised("leoam", budget=0.05, sink_tokens=4, window_tokens=64)
    assert preset.sparse is not None
    recipe = IndexRecipe(WatchedIndex, {"leaf_tokens": 8, "patience": 4})
    return replace(preset, sparse=replace(preset.sparse, index=recipe, early=None))


@pytest.mark.leaks
def test_searches_go_on_from_the_last_one_until_tokens_are_dropped(tmp_path: Path) -> None:
    model = make_model("llama")
    layers = model.config.num_hidden_layers
    WatchedIndex.seen.clear()
    with (
        OffloadedCache(TIERS, policy=watched(), disk_path=tmp_path, chunk_tokens=SIZE) as cache,
        torch.no_grad(),
    ):
        model(prompt(1, 2400), past_key_values=cache)
        decode(model, cache, prompt(1, 1, seed=4), steps=3)
        first = [past is None for past in WatchedIndex.seen[:layers]]
        later = [past is None for past in WatchedIndex.seen[layers:]]
        assert all(first)
        assert later
        assert not any(later)
        cache.crop(-1000)
        WatchedIndex.seen.clear()
        decode(model, cache, prompt(1, 1, seed=4), steps=1)
        assert WatchedIndex.seen[:layers] == [None] * layers


@pytest.mark.leaks
def test_early_layers_are_indexed_and_read_otherwise_than_the_others(tmp_path: Path) -> None:
    model = make_model("llama")
    preset = customised("leoam", budget=0.05, sink_tokens=4, window_tokens=64, leaf_tokens=8)
    assert preset.sparse is not None
    assert preset.sparse.early is not None
    early = replace(preset.sparse.early, num_layers=1)
    preset = replace(preset, sparse=replace(preset.sparse, early=early))
    with (
        OffloadedCache(TIERS, policy=preset, disk_path=tmp_path, chunk_tokens=SIZE) as cache,
        torch.no_grad(),
    ):
        model(prompt(1, 2400), past_key_values=cache)
        decode(model, cache, prompt(1, 1, seed=4), steps=1)
        runtime = cache._core.runtime
        assert runtime is not None
        assert runtime.engine.retrieval is not None
        held = runtime.engine.retrieval.indexes
        assert held is not None
        leaves = {
            runtime.engine.store.table[segments[0][0]].info.layer: index.settings.leaf_tokens
            for segments, index in held._joined.items()
            if isinstance(index, TreeIndex)
        }
        stats = cache.stats()
    layers, heads = model.config.num_hidden_layers, model.config.num_key_value_heads
    assert leaves == {layer: 4 if layer == 0 else 8 for layer in range(layers)}
    # One position of the prompt's end and one step were searched; budgets follow the context.
    share = stats.retrieved_tokens / stats.covered_tokens
    covered = stats.covered_tokens / (layers * heads)
    assert covered > 1000
    assert 0.5 / layers < share < (0.5 + 0.06 * layers) / layers * 2400 / 1024


def test_leoam_answers_questions_about_a_document(tmp_path: Path) -> None:
    model, tokenizer = load_recall_model()
    document = build_document(4096, 8, seed=3)
    reader, facts = Reader(model, tokenizer, document, 1024), choose_facts(document, 4, seed=3)
    assert PRESETS["leoam"].sparse is not None
    with OffloadedCache(
        TIERS,
        policy="leoam",
        capacity=small_capacity(kv_bytes(model, 4096)) | {"disk": "1GiB"},
        disk_path=tmp_path,
    ) as cache:
        prefill(model, cache, torch.tensor([document.token_ids]), 1024, lambda count: None)
        answers = []
        for fact in facts:
            fork = cache.fork()
            answers.append(is_correct(fact, reader.ask(fork, fact)))
            fork.close()
        stats = cache.stats()
    assert all(answers)
    assert stats.retrieved_tokens < stats.covered_tokens
