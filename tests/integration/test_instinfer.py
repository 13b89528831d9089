"""InstInfer's preset through real models: the tokens of a cache in memory, and less is read."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache

from offload import ConfigError, OffloadedCache
from offload.demo import Reader, choose_facts, kv_bytes
from offload.prefill import prefill
from offload.presets import Preset, customised
from offload.recall_data import build_document, is_correct
from offload.recall_model import load_recall_model
from offload.store import ChunkStore
from offload.types import ChunkId
from tests.support.cells import compare, expected_outcome
from tests.support.models import make_model, tight_capacity
from tests.support.modes import MODES
from tests.support.near import held_launcher
from tests.support.near_caches import DENSE, TIERS, near, open_small
from tests.support.small_caches import (
    check_continues,
    check_nothing_left,
    check_sound,
    draw_ids,
    plain_after,
    step,
)


@pytest.fixture(scope="module", autouse=True)
def _launcher() -> Iterator[None]:
    with held_launcher():
        yield


@pytest.fixture
def _written_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no chunk be on its way to the disk for long: those are not the workers' yet."""
    put = ChunkStore.put

    def put_and_wait(store: ChunkStore, *arguments: Any) -> list[list[ChunkId]]:
        placed = put(store, *arguments)
        store.drain()
        return placed

    monkeypatch.setattr(ChunkStore, "put", put_and_wait)


@pytest.mark.leaks
@pytest.mark.usefixtures("_written_at_once")
@pytest.mark.parametrize("mode", ["padded", "beams_padded", "prefix_forks", "crop", "pieces"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_generate_with_attention_beside_the_disk_gives_the_tokens_of_dynamic_cache(
    architecture: str, mode: str, tmp_path: Path
) -> None:
    model = make_model(architecture)
    capacity = tight_capacity(model, MODES[mode].rows, 8)
    made: list[OffloadedCache] = []
    with ExitStack() as stack:

        def make() -> Cache:
            cache = OffloadedCache(
                TIERS,
                policy=DENSE,
                capacity={tier: capacity[tier] for tier in TIERS},
                disk_path=[tmp_path / "a", tmp_path / "b"],
                chunk_tokens=8,
            )
            made.append(stack.enter_context(cache))
            return cache

        comparison = compare(expected_outcome(architecture, "sdpa", mode), MODES[mode](model, make))
        assert comparison.same_tokens, f"logits differ by up to {comparison.logit_error}"
        assert comparison.logit_error <= 1e-4
        made[0].check_integrity()
        assert near(made[0]).counters()["attended_rows"] > 0
    for name in ("a", "b"):
        check_nothing_left(tmp_path / name)


@pytest.mark.leaks
def test_deep_copy_attends_to_shared_chunks_and_each_goes_its_own_way(tmp_path: Path) -> None:
    ids, more = draw_ids(2, 60), draw_ids(2, 30, seed=5)
    with open_small(tmp_path) as cache:
        step(cache, ids)
        fork = copy.deepcopy(cache)
        with fork:
            step(fork, more)
            assert near(fork) is near(cache)
            check_continues(fork, plain_after(ids, more))
        cache.crop(-25)
        check_continues(cache, plain_after(ids[:, :-25]))
        check_sound(cache, 35 + 12)


def test_sparf_answers_questions_about_a_document_and_reads_a_part_of_it(tmp_path: Path) -> None:
    num_tokens = 2048
    model, tokenizer = load_recall_model()
    document = build_document(num_tokens, 8, seed=3)
    reader, facts = Reader(model, tokenizer, document, 1024), choose_facts(document, 4, seed=3)
    # The question, too, is asked beside the disk, and channels of what is before it lie in files.
    sparf = customised("instinfer", max_queries=64, block_tokens=256)
    with OffloadedCache(
        TIERS,
        policy=sparf,
        capacity={"gpu": kv_bytes(model, num_tokens) // 5, "disk": "1GiB"},
        disk_path=[tmp_path / "a", tmp_path / "b"],
    ) as cache:
        prefill(model, cache, torch.tensor([document.token_ids]), 1024, lambda count: None)
        cache.flush()
        answers = []
        for fact in facts:
            with cache.fork() as fork:
                answers.append(is_correct(fact, reader.ask(fork, fact)))
        stats, counted = cache.stats(), near(cache).counters()
    assert all(answers)
    assert stats.retrieved_tokens == pytest.approx(stats.covered_tokens / 16, rel=0.01)
    assert stats.near is not None
    assert stats.near["num_calls"] > 0
    # An eighth of K in 8 bits, a sixteenth of K and V, and whole pages: far less than everything.
    row_bytes = 2 * model.config.head_dim * model.dtype.itemsize
    read_bytes = stats.near["read_bytes"]
    assert 0 < read_bytes < 0.2 * stats.covered_tokens * row_bytes
    assert stats.near["asked_bytes"] + stats.near["answered_bytes"] < 0.1 * read_bytes
    assert counted["channel_blocks"] > 0
    assert counted["channel_dropped"] == counted["channel_failed"] == 0


@pytest.mark.parametrize(
    ("changes", "quoted"),
    [
        ({"tiers": ["gpu", "cpu"], "disk_path": None}, "needs the tier 'disk'"),
        ({"codec": "int8"}, "'instinfer' reads chunks as they are; codec='int8'"),
        ({"policy": "exact"}, "'exact' writes to one path, not 2"),
        ({"policy": "leoam"}, "'leoam' writes to one path, not 2"),
        ({"disk_path": []}, r"a list of paths, not \[\]"),
        ({"disk_path": [3]}, r"a list of paths, not \[3\]"),
        ({"budget": 0}, "budget=0"),
        ({"error": 0.1}, "it takes no error"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_before_any_folder_is_made(
    tmp_path: Path, changes: dict[str, Any], quoted: str
) -> None:
    tiers = changes.get("tiers", TIERS)
    arguments = {"policy": "instinfer", "capacity": dict.fromkeys(tiers, "8MiB"), **changes}
    with pytest.raises(ConfigError, match=quoted):
        open_small(tmp_path, **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.leaks
@pytest.mark.parametrize(
    ("policy", "quoted"),
    [
        (customised("instinfer", workers_per_path=2), r"2 paths with 2 workers .* 2 KV heads"),
        (customised("instinfer", block_tokens=4), "blocks of 4 tokens"),
    ],
    ids=["workers", "blocks"],
)
def test_what_does_not_suit_the_model_is_refused_by_its_first_step(
    tmp_path: Path, policy: Preset, quoted: str
) -> None:
    with open_small(tmp_path, policy) as cache:
        with pytest.raises(ConfigError, match=quoted):
            step(cache, draw_ids(1, 8))
        assert cache.get_seq_length() == 0
    for name in ("a", "b"):
        check_nothing_left(tmp_path / name)
