"""Imports that others meet, and what sessions of strangers may not become."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from offload import ConfigError, OffloadedCache
from offload.sessions.rebuild import rebuild
from offload.sessions.saving import Content
from offload.sessions.store import SessionStore
from tests.support.model_sessions import save_model_session
from tests.support.recipes import assert_clean
from tests.support.sessions import (
    WAIT_S,
    expected_payloads,
    make_content,
    make_token_ids,
    read_back,
    save,
    small_store,
)
from tests.support.small_caches import draw_ids, generate, make_cache, make_llama

_TOKENS = make_token_ids(4, 3, 2)
_SHORT = make_content(2, 1, 2, _TOKENS)
_LONG = make_content(4, 1, 2, _TOKENS)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SessionStore]:
    with small_store(tmp_path / "root") as opened:
        yield opened


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An archive of ``_SHORT``."""
    with small_store(tmp_path / "source") as source:
        save(source, "chat", _SHORT)
        source.export("chat", tmp_path / "archive")
    return tmp_path / "archive"


def _import_together(
    stores: Sequence[SessionStore], paths: Sequence[Path], *, overwrite: bool
) -> list[BaseException | None]:
    """Import archives under one name; all have begun to verify when the first goes on."""
    barrier = threading.Barrier(len(stores), timeout=WAIT_S)

    def act(store: SessionStore, path: Path) -> None:
        def meet(done: int, total: int) -> None:
            if done == 1:
                barrier.wait()

        store.import_(path, "new", meet, overwrite=overwrite)

    with ThreadPoolExecutor(len(stores)) as pool:
        futures = [pool.submit(act, *each) for each in zip(stores, paths, strict=True)]
        return [future.exception(WAIT_S) for future in futures]


@pytest.mark.parametrize("overwrite", [False, True])
def test_two_imports_of_one_name_at_once_end_with_one_of_them_whole(
    overwrite: bool, tmp_path: Path
) -> None:
    contents = [make_content(4, seed) for seed in (1, 2)]
    paths = [tmp_path / f"{number}" for number in range(2)]
    with small_store(tmp_path / "source") as source:
        for content, path in zip(contents, paths, strict=True):
            save(source, "chat", content)
            source.export("chat", path)
    with small_store(tmp_path / "root") as store:
        with SessionStore(store.path) as other:
            errors = _import_together((store, other), paths, overwrite=overwrite)
        failed = [error for error in errors if error is not None]
        assert [type(error) for error in failed] == ([] if overwrite else [ConfigError])
        assert all("there is a session 'new' already" in str(error) for error in failed)
        good = [c for c, e in zip(contents, errors, strict=True) if e is None]
        assert read_back(store, "new") in [expected_payloads(content) for content in good]
        assert [info.name for info in store.list()] == ["new"]
        assert_clean(store)


def _find(store: SessionStore, content: Content) -> int:
    """Return how many chunks the tokens of a session find."""
    assert content.token_ids is not None
    namespace, size = content.namespace, content.layout.chunk_tokens
    found = store.find_prefix(
        namespace.model_digest, size, content.token_ids, lambda _: namespace.digest, content.layers
    )
    if found is None:
        return 0
    found[1].release()
    return len(found[1].rows[0])


@pytest.mark.parametrize(("is_trusted", "num_found"), [(False, 0), (True, 2)])
def test_imported_chunks_are_found_by_their_tokens_only_if_they_are_trusted(
    is_trusted: bool, num_found: int, store: SessionStore, path: Path
) -> None:
    store.import_(path, "new", trust_prefixes=is_trusted)
    ids = store.describe("new").token_ids
    assert ids is not None
    assert torch.equal(ids, _TOKENS[:, : _SHORT.num_tokens])
    assert _find(store, _LONG) == num_found
    store.close()
    rebuild(store.path)
    with SessionStore(store.path) as again:
        assert _find(again, _LONG) == num_found
        assert read_back(again, "new") == expected_payloads(_SHORT)
        assert_clean(again)


def test_import_that_is_not_trusted_does_not_share_chunks_with_another(
    store: SessionStore, path: Path
) -> None:
    """Scenario: two strangers tell the same tokens, and one of them lies about their keys."""
    save(store, "own", _SHORT)
    assert store.import_(path, "first").written_bytes > 0
    assert store.import_(path, "second").written_bytes > 0
    store.delete("own")
    assert _find(store, _LONG) == 0
    assert read_back(store, "first") == read_back(store, "second") == expected_payloads(_SHORT)
    assert_clean(store)


def _go_on_with(store: SessionStore, name: str) -> Content:
    """Return what a cache holds that has loaded ``_SHORT``, and gone on to ``_LONG``."""
    columns = [column for row in _SHORT.rows for column in row]
    refs = [ref for row in store.describe(name).rows for ref in row]
    return replace(_LONG, known=dict(zip(columns, refs, strict=True)))


def test_what_is_added_to_an_import_is_not_trusted_either(store: SessionStore, path: Path) -> None:
    """Scenario: a session of a stranger is loaded, gone on with, and saved with its tokens."""
    added_bytes = store.import_(path, "new").written_bytes
    saved = store.save("more", _go_on_with(store, "new"))
    saved.held.release()
    assert saved.written_bytes == added_bytes
    assert _find(store, _LONG) == 0
    assert read_back(store, "more") == expected_payloads(_LONG)
    save(store, "own", _LONG)
    assert _find(store, _LONG) == 4
    assert_clean(store)


@pytest.mark.parametrize(("is_trusted", "num_found"), [(False, 0), (True, 4)])
def test_import_that_was_not_trusted_can_be_exported_again(
    is_trusted: bool, num_found: int, store: SessionStore, path: Path, tmp_path: Path
) -> None:
    store.import_(path, "new")
    store.save("more", _go_on_with(store, "new")).held.release()
    store.export("more", tmp_path / "again")
    with small_store(tmp_path / "other") as other:
        other.import_(tmp_path / "again", "again", trust_prefixes=is_trusted)
        assert _find(other, _LONG) == num_found
        assert read_back(other, "again") == expected_payloads(_LONG)
        assert_clean(other)


def test_cache_that_has_loaded_an_import_does_not_teach_others_its_prefix(
    store: SessionStore, tmp_path: Path
) -> None:
    model = make_llama()
    with small_store(tmp_path / "source") as source:
        save_model_session(source, "chat", seed=3, scratch=tmp_path)
        source.export("chat", tmp_path / "archive")
    store.import_(tmp_path / "archive", "chat")
    with OffloadedCache.load("chat", model, store=store, disk_path=tmp_path / "disk") as cache:
        assert cache.token_ids is not None
        tokens = generate(cache, torch.cat([cache.token_ids, draw_ids(1, 9, seed=4)], 1), 20)
        cache.save("chat", store=store, token_ids=tokens)
    with make_cache(tmp_path) as cache:
        assert cache.reuse(tokens, model, store=store) == 0
        assert torch.equal(generate(cache, tokens[:, :-5], 5), tokens)
        cache.save("own", store=store, model=model, token_ids=tokens)
    with make_cache(tmp_path) as cache:
        assert cache.reuse(tokens, model, store=store) > 0
