"""Abstracts that are saved with a session are those that would be built, or are built again."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload import SessionStore, saved_indexes
from offload.presets import Preset
from offload.saved_indexes import INDEXES, pack_indexes
from offload.sparse.builder import IndexBuilder, Job
from tests.support.leoam_sessions import (
    MORE_TOKENS,
    NUM_SEGMENTS,
    SIZE,
    check_alike,
    go_on,
    in_short_segments,
    leoam,
    load,
    make_root,
    open_cache,
    read,
    runtime_of,
    save,
)
from tests.support.models import make_model
from tests.support.sessions import small_store

Built = list[tuple[int, ...]]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> Built:
    """What indexes are built over from now on."""
    seen: Built = []
    make = IndexBuilder._make

    def watch(self: IndexBuilder, job: Job, *rest: Any) -> Any:
        seen.append(job.chunks)
        return make(self, job, *rest)

    monkeypatch.setattr(IndexBuilder, "_make", watch)
    return seen


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_root(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def store(root: Path) -> Iterator[SessionStore]:
    with small_store(root) as opened:
        yield opened


def state_of(store: SessionStore, name: str) -> dict[str, Any]:
    file, held = store.open(name)
    held.release()
    return dict(file.state)


def test_only_a_session_with_abstracts_has_them_in_its_file(store: SessionStore) -> None:
    layers = make_model("llama").config.num_hidden_layers
    saved = state_of(store, "chat")[INDEXES]
    assert sorted(each["layer"] for each in saved) == list(range(layers))
    assert [each["lengths"] for each in saved] == [[128 // SIZE] * NUM_SEGMENTS] * layers
    assert INDEXES not in state_of(store, "bare")


@pytest.mark.leaks
@pytest.mark.parametrize("abstracts", ["ram", "disk"])
def test_loaded_session_builds_no_index_and_answers_as_the_cache_that_was_not_saved(
    abstracts: str, built: Built, tmp_path: Path
) -> None:
    policy = leoam(abstracts=abstracts)
    with small_store(tmp_path / "root") as store:
        with open_cache(tmp_path, policy) as cache:
            read(cache)
            save(cache, store)
            assert built
            built.clear()
        with load(store, tmp_path, policy) as cache:
            found = go_on(cache)
            retrieved = cache.stats().retrieved_tokens
            cache.check_integrity()
            assert built == []
    assert retrieved > 0
    with open_cache(tmp_path, policy) as cache:
        read(cache)
        check_alike(found, go_on(cache))


def test_session_without_abstracts_has_them_built_and_answers_alike(
    store: SessionStore, built: Built, tmp_path: Path
) -> None:
    with load(store, tmp_path) as cache, load(store, tmp_path, name="bare") as bare:
        expected = go_on(cache)
        assert built == []
        assert torch.equal(go_on(bare), expected)
        assert built


@pytest.mark.parametrize(
    "policy",
    [
        leoam(leaf_tokens=16),
        leoam(bits=None),
        in_short_segments("quest"),
        in_short_segments("adaptive"),
        leoam(sink_tokens=40),
        leoam(streaming_heads=[[True, False]] * 3),
    ],
    ids=["leaves", "bits", "quest", "adaptive", "sinks", "heads"],
)
def test_session_loaded_with_other_options_has_its_indexes_built_anew(
    policy: Preset, store: SessionStore, built: Built, tmp_path: Path
) -> None:
    with load(store, tmp_path, policy) as cache, load(store, tmp_path, policy, "bare") as bare:
        found = go_on(cache)
        num_built = len(built)
        assert num_built > 0
        assert torch.equal(found, go_on(bare))
        if policy.sparse is not None and policy.sparse.early is None:
            assert len(built) == 2 * num_built


def test_layers_whose_own_index_is_as_before_keep_it(
    store: SessionStore, built: Built, tmp_path: Path
) -> None:
    early, layers = 2, make_model("llama").config.num_hidden_layers
    with load(store, tmp_path, leoam(leaf_tokens=16)) as cache:
        go_on(cache)
    assert len(built) == (layers - early) * NUM_SEGMENTS


def test_policy_that_reads_everything_takes_no_notice_of_indexes(
    store: SessionStore, built: Built, tmp_path: Path
) -> None:
    with load(store, tmp_path, "exact") as cache, load(store, tmp_path, "exact", "bare") as bare:
        assert torch.equal(go_on(cache), go_on(bare))
    assert built == []


def test_loaded_session_that_is_saved_again_keeps_its_indexes(
    store: SessionStore, built: Built, tmp_path: Path
) -> None:
    with small_store(tmp_path / "root") as other:
        with load(store, tmp_path) as cache:
            expected = go_on(cache)
        with load(store, tmp_path) as cache:
            save(cache, other)
        with load(other, tmp_path) as cache:
            assert torch.equal(go_on(cache), expected)
    assert built == []


def test_loaded_session_that_grows_builds_only_what_is_new(
    store: SessionStore, built: Built, tmp_path: Path
) -> None:
    layers = make_model("llama").config.num_hidden_layers
    with load(store, tmp_path) as cache, load(store, tmp_path, name="bare") as bare:
        read(cache, num_tokens=MORE_TOKENS, seed=2)
        assert len(built) == 2 * layers
        read(bare, num_tokens=MORE_TOKENS, seed=2)
        assert torch.equal(go_on(cache), go_on(bare))


def test_parent_saved_after_its_fork_went_elsewhere_has_its_own_indexes(
    built: Built, tmp_path: Path
) -> None:
    with small_store(tmp_path / "root") as store:
        with open_cache(tmp_path) as parent:
            read(parent)
            with parent.fork() as fork:
                read(parent, num_tokens=MORE_TOKENS, seed=2)
                read(fork, num_tokens=MORE_TOKENS, seed=3)
                save(parent, store, "parent")
                save(fork, store, "fork")
                expected = {"parent": go_on(parent), "fork": go_on(fork)}
        assert not torch.equal(expected["parent"], expected["fork"])
        for name, logits in expected.items():
            with load(store, tmp_path, name=name) as cache:
                check_alike(go_on(cache), logits)


def test_parent_saved_after_its_fork_grew_has_the_indexes_that_they_share(
    built: Built, tmp_path: Path
) -> None:
    with small_store(tmp_path / "root") as store:
        with open_cache(tmp_path) as parent:
            read(parent)
            with parent.fork() as fork:
                read(fork, num_tokens=MORE_TOKENS, seed=3)
                save(parent, store)
            expected = go_on(parent)
        built.clear()
        with load(store, tmp_path) as cache:
            check_alike(go_on(cache), expected)
    assert built == []


def test_rows_of_a_batch_have_indexes_of_their_own(built: Built, tmp_path: Path) -> None:
    layers = make_model("llama").config.num_hidden_layers
    with small_store(tmp_path / "root") as store:
        with open_cache(tmp_path) as cache:
            read(cache, batch=2)
            save(cache, store)
            expected = go_on(cache, batch=2)
        places = [(each["layer"], each["row"]) for each in state_of(store, "chat")[INDEXES]]
        assert sorted(places) == [(layer, row) for layer in range(layers) for row in range(2)]
        built.clear()
        with load(store, tmp_path) as cache:
            check_alike(go_on(cache, batch=2), expected)
    assert built == []


@pytest.mark.parametrize("num_tokens", [0, MORE_TOKENS])
def test_rows_that_share_chunks_answer_as_before(
    num_tokens: int, built: Built, tmp_path: Path
) -> None:
    with small_store(tmp_path / "root") as store:
        with open_cache(tmp_path) as cache:
            read(cache)
            cache.batch_repeat_interleave(2)
            if num_tokens:
                read(cache, batch=2, num_tokens=num_tokens, seed=2)
            save(cache, store)
            expected = go_on(cache, batch=2)
        built.clear()
        with load(store, tmp_path) as cache:
            check_alike(go_on(cache, batch=2), expected)
    if not num_tokens:
        assert built == []


@pytest.mark.leaks
def test_imported_session_has_its_indexes_built_here(
    store: SessionStore, built: Built, tmp_path: Path
) -> None:
    archive = tmp_path / "chat.kv.tar.zst"
    store.export("chat", archive)
    with small_store(tmp_path / "other") as other:
        other.import_(archive)
        file, held = other.open("chat")
        held.release()
        assert INDEXES not in file.state
        assert not [name for name in file.tensors if name.startswith("index")]
        with load(other, tmp_path) as cache, load(store, tmp_path) as ours:
            assert torch.equal(go_on(cache), go_on(ours))
    assert built


def test_indexes_that_would_make_the_file_too_large_are_left_out(
    store: SessionStore, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with small_store(tmp_path / "root") as other:
        with load(store, tmp_path) as cache:
            tensors, saved = pack_indexes(runtime_of(cache))
            first = sum(tensors[name].nbytes for name in saved[0]["tensors"])
            monkeypatch.setattr(saved_indexes, "_MOST_BYTES", first)
            save(cache, other)
            expected = go_on(cache)
        assert [each["layer"] for each in state_of(other, "chat")[INDEXES]] == [0]
        with load(other, tmp_path) as cache:
            assert torch.equal(go_on(cache), expected)
    assert built
