"""Sessions through real models: what is loaded goes on exactly where it was saved."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from offload import (
    ConfigError,
    CorruptChunk,
    NamespaceMismatch,
    OffloadedCache,
    SessionNotFound,
    SessionStore,
)
from tests.support.generation import NEW_TOKENS, generate, padded_prompt, prompt
from tests.support.models import ARCHITECTURES, make_model, tight_capacity

pytestmark = pytest.mark.leaks

TIERS = ("gpu", "cpu", "disk")
OFFLOADING = [name for name, row in ARCHITECTURES.items() if row.offloads]
SIZE = 8


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SessionStore]:
    with SessionStore(tmp_path / "root", quota="256MiB", min_free=0) as opened:
        yield opened
        assert opened.fsck().is_clean


def new_cache(model: PreTrainedModel, tmp_path: Path, rows: int = 1) -> OffloadedCache:
    return OffloadedCache(
        TIERS,
        capacity=tight_capacity(model, rows, SIZE),
        disk_path=tmp_path / "scratch",
        chunk_tokens=SIZE,
    )


def load(
    model: PreTrainedModel, tmp_path: Path, store: SessionStore, name: str = "chat", rows: int = 1
) -> OffloadedCache:
    return OffloadedCache.load(
        name,
        model,
        store=store,
        capacity=tight_capacity(model, rows, SIZE),
        disk_path=tmp_path / "scratch",
    )


def next_turn(ids: Tensor, seed: int = 5) -> Tensor:
    return torch.cat([ids, prompt(ids.shape[0], 9, seed=seed)], 1)


def tokens(model: PreTrainedModel, cache: object, ids: Tensor, **kwargs: Tensor) -> Tensor:
    return generate(model, cache, input_ids=ids, **kwargs).tokens[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OFFLOADING)
def test_loaded_session_continues_with_the_tokens_of_dynamic_cache(
    name: str, tmp_path: Path, store: SessionStore
) -> None:
    model = make_model(name, "eager")
    stock = DynamicCache(config=model.config)
    first = tokens(model, stock, prompt(2, 61))
    second = tokens(model, stock, next_turn(first))
    with new_cache(model, tmp_path, 2) as cache:
        assert torch.equal(tokens(model, cache, prompt(2, 61)), first)
        cache.save("chat", store=store, token_ids=first)
        cache.check_integrity()
        assert torch.equal(tokens(model, cache, next_turn(first)), second)
    with load(model, tmp_path, store, rows=2) as cache:
        assert cache.token_ids is not None
        assert torch.equal(cache.token_ids, first[:, :-1])
        assert torch.equal(tokens(model, cache, next_turn(first)), second)
        cache.check_integrity()


def test_loaded_session_of_padded_rows_continues_like_dynamic_cache(
    tmp_path: Path, store: SessionStore
) -> None:
    model, inputs = make_model("qwen3"), padded_prompt((52, 33))
    stock = DynamicCache(config=model.config)
    first = generate(model, stock, **inputs).tokens[0]
    grown = torch.ones_like(next_turn(first))
    grown[:, : inputs["attention_mask"].shape[1]] = inputs["attention_mask"]
    second = tokens(model, stock, next_turn(first), attention_mask=grown)
    with new_cache(model, tmp_path, 2) as cache:
        generate(model, cache, **inputs)
        cache.save("chat", store=store)
    with load(model, tmp_path, store, rows=2) as cache:
        assert cache.token_ids is None
        assert torch.equal(tokens(model, cache, next_turn(first), attention_mask=grown), second)


@torch.no_grad()
def test_saved_rows_that_share_chunks_are_written_once(tmp_path: Path, store: SessionStore) -> None:
    model = make_model("llama")
    with new_cache(model, tmp_path, 4) as cache:
        model(prompt(1, 50), past_key_values=cache)
        cache.batch_repeat_interleave(4)
        model(prompt(4, 3), past_key_values=cache)
        info = cache.save("rows", store=store)
        expected = [cache.layers[1].keys, cache.layers[1].values]
    assert info.num_rows == 4
    assert info.num_chunks == 6 * 3
    with load(model, tmp_path, store, "rows", rows=4) as cache:
        found = [cache.layers[1].keys, cache.layers[1].values]
        for a, b in zip(expected, found, strict=True):
            assert torch.equal(a, b)


def test_second_save_writes_only_what_the_turn_added(tmp_path: Path, store: SessionStore) -> None:
    model = make_model("llama")
    with new_cache(model, tmp_path) as cache:
        first = tokens(model, cache, prompt(1, 61))
        before = cache.save("chat", store=store)
        written: list[int] = []
        tokens(model, cache, next_turn(first))
        after = cache.save("chat", store=store, progress=lambda done, total: written.append(total))
    assert set(written) == {after.num_chunks - before.num_chunks}
    assert [session.name for session in store.list()] == ["chat"]


def test_saved_chunks_leave_the_room_of_their_copies_on_disk(
    tmp_path: Path, store: SessionStore
) -> None:
    model = make_model("llama")
    with new_cache(model, tmp_path) as cache:
        tokens(model, cache, prompt(1, 90))
        cache.flush()
        before = cache.stats().tiers["disk"]
        cache.save("chat", store=store)
        after = cache.stats().tiers["disk"]
        assert before.used_bytes > 0
        assert after.used_bytes == 0
        assert after.num_chunks == before.num_chunks
        cache.check_integrity()


def test_loaded_session_reads_nothing_until_it_is_attended_to(
    tmp_path: Path, store: SessionStore
) -> None:
    model = make_model("llama")
    with new_cache(model, tmp_path) as cache:
        first = tokens(model, cache, prompt(1, 90))
        cache.save("chat", store=store)
    with load(model, tmp_path, store) as cache:
        assert cache.get_seq_length() == first.shape[1] - 1
        assert cache.stats().tiers["disk"].loaded_bytes == 0
        tokens(model, cache, next_turn(first))
        assert cache.stats().tiers["disk"].loaded_bytes > 0


def test_forks_of_a_loaded_session_continue_independently(
    tmp_path: Path, store: SessionStore
) -> None:
    model, stock = make_model("qwen3"), DynamicCache()
    first = tokens(model, stock, prompt(1, 61))
    expected = [
        tokens(model, DynamicCache(), next_turn(first, seed)) for seed in (7, 8)
    ]  # greedy: a fresh cache gives the same
    with new_cache(model, tmp_path) as cache:
        tokens(model, cache, prompt(1, 61))
        cache.save("chat", store=store)
    with load(model, tmp_path, store, rows=3) as cache:
        forks = [cache.fork(), cache.fork()]
        cache.close()
        found = [
            tokens(model, fork, next_turn(first, seed))
            for fork, seed in zip(forks, (7, 8), strict=True)
        ]
        forks[0].save("one", store=store, token_ids=found[0])
        for fork in forks:
            fork.close()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert not any(session.is_open for session in store.list())


@pytest.mark.parametrize("rows", [1, 2])
def test_reused_prefix_gives_the_tokens_of_dynamic_cache(
    rows: int, tmp_path: Path, store: SessionStore
) -> None:
    model = make_model("llama")
    first = tokens(model, DynamicCache(), prompt(rows, 61))
    other = torch.cat([first[:, :45], prompt(rows, 20, seed=9)], 1)
    expected = tokens(model, DynamicCache(), other)
    with new_cache(model, tmp_path, rows) as cache:
        tokens(model, cache, prompt(rows, 61))
        cache.save("chat", store=store, token_ids=first)
    with new_cache(model, tmp_path, rows) as cache:
        assert cache.reuse(other, model, store=store) == 40
        assert torch.equal(tokens(model, cache, other), expected)
        cache.check_integrity()
        cache.save("other", store=store, token_ids=expected)
    assert store.info("other").own_bytes < store.info("other").num_bytes


def test_reuse_of_a_damaged_prefix_ends_before_the_damage(
    tmp_path: Path, store: SessionStore
) -> None:
    model = make_model("llama")
    first = tokens(model, DynamicCache(), prompt(1, 61))
    with new_cache(model, tmp_path) as cache:
        tokens(model, cache, prompt(1, 61))
        cache.save("chat", store=store, token_ids=first)
    flip_chunk(store, position=3)
    with new_cache(model, tmp_path) as cache:
        assert cache.reuse(first, model, store=store) == 3 * SIZE
        found = tokens(model, cache, first)
        assert torch.equal(found, tokens(model, DynamicCache(), first))
        cache.save("again", store=store, token_ids=found)
    with pytest.raises(CorruptChunk, match="damaged"):
        load(model, tmp_path, store)
    assert store.info("chat").is_damaged
    with load(model, tmp_path, store, "again") as cache:
        assert cache.get_seq_length() == first.shape[1] + NEW_TOKENS - 1
    store.delete("chat")


def test_damage_met_while_attending_is_an_error_and_is_remembered(
    tmp_path: Path, store: SessionStore
) -> None:
    model = make_model("llama")
    with new_cache(model, tmp_path) as cache:
        first = tokens(model, cache, prompt(1, 90))
        cache.save("chat", store=store)
    flip_chunk(store, position=1)
    with load(model, tmp_path, store) as cache:
        with pytest.raises(CorruptChunk):
            tokens(model, cache, next_turn(first))
        assert cache.get_seq_length() == first.shape[1] - 1
    assert store.info("chat").is_damaged
    assert len(list((store.path / "quarantine").glob("*.kvrecord"))) == 1
    store.delete("chat")


def flip_chunk(store: SessionStore, position: int) -> None:
    """Flip a byte in the middle of the first layer's chunk at a position of the only segment."""
    [path] = (store.path / "segments").rglob("*.kvseg")
    [_, num_positions] = next(iter(store.describe("chat").segments.values()))
    content = bytearray(path.read_bytes())
    size = len(content) // (num_positions * 3)
    content[position * size + 4096 + 100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "field"), [("weights", "weights"), ("config", "config"), ("dtype", "dtype")]
)
def test_session_of_another_model_is_refused_by_name_of_the_field(
    change: str, field: str, tmp_path: Path, store: SessionStore
) -> None:
    model = make_model("llama")
    with new_cache(model, tmp_path) as cache:
        first = tokens(model, cache, prompt(1, 40))
        cache.save("chat", store=store, token_ids=first)
    other = make_model("olmo2" if change == "config" else "llama", seed=len(change))
    if change == "dtype":
        other.bfloat16()
    with pytest.raises(NamespaceMismatch, match=field):
        load(other, tmp_path, store)
    with new_cache(other, tmp_path) as cache:
        assert cache.reuse(first, other, store=store) == 0


def test_salt_of_another_tenant_finds_nothing(tmp_path: Path, store: SessionStore) -> None:
    model = make_model("llama")
    with new_cache(model, tmp_path) as cache:
        ids = tokens(model, cache, prompt(1, 40))
        cache.save("chat", store=store, token_ids=ids)
    with SessionStore(store.path, salt="somebody else") as other:
        with pytest.raises(NamespaceMismatch, match="salt"):
            load(model, tmp_path, other)
        with new_cache(model, tmp_path) as cache:
            assert cache.reuse(ids, model, store=other) == 0


def test_session_is_saved_to_the_default_store_and_found_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model = make_model("llama")
    with new_cache(model, tmp_path) as cache:
        first = tokens(model, cache, prompt(1, 40))
        cache.save("chat")
    with OffloadedCache.load("chat", model, disk_path=tmp_path / "scratch") as cache:
        second = tokens(model, cache, next_turn(first))
    assert torch.equal(second, tokens(model, DynamicCache(), next_turn(first)))


def test_save_without_tokens_rows_or_model_says_what_is_missing(
    tmp_path: Path, store: SessionStore
) -> None:
    model = make_model("llama")
    with new_cache(model, tmp_path) as cache:
        with pytest.raises(ConfigError, match="model="):
            cache.save("chat", store=store)
        tokens(model, cache, prompt(1, 40))
        with pytest.raises(ConfigError, match="token_ids has 1 rows of 5"):
            cache.save("chat", store=store, token_ids=prompt(1, 5))
        with pytest.raises(ConfigError, match="is no name"):
            cache.save("../chat", store=store)
        with pytest.raises(ConfigError, match="empty cache"):
            cache.reuse(prompt(1, 40), model, store=store)
        cache.check_integrity()
    with pytest.raises(SessionNotFound, match="among its 0"):
        load(model, tmp_path, store)
    with pytest.raises(ConfigError, match="add 'disk'"):
        OffloadedCache.load("chat", model, store=store, tiers=["gpu", "cpu"])


def test_model_without_offloaded_layers_is_told_that_there_is_nothing_to_save(
    tmp_path: Path, store: SessionStore
) -> None:
    model = make_model("mistral_sliding")
    with OffloadedCache(TIERS, capacity=dict.fromkeys(TIERS, 1 << 20), disk_path=tmp_path) as cache:
        tokens(model, cache, prompt(1, 40))
        with pytest.raises(ConfigError, match="no layer"):
            cache.save("chat", store=store)
