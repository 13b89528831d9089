"""A conversation of a real model that goes on, on another machine."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offload import OffloadedCache
from offload.errors import NamespaceMismatch
from offload.sessions.remote_sessions import RemoteSessions
from tests.support.model_sessions import assert_model_continues, save_model_session
from tests.support.s3_server import BUCKET, s3_options, s3_server
from tests.support.sessions import small_store
from tests.support.small_caches import CAPACITY, CHUNK_TOKENS, make_llama


@pytest.fixture(scope="module", params=["folder", "s3"])
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, dict[str, object]]]:
    """Return the URL of a store, and its options."""
    if request.param == "folder":
        yield (tmp_path_factory.mktemp("bucket").as_uri(), {})
    else:
        with s3_server() as port:
            yield f"s3://{BUCKET}/{uuid.uuid4().hex}", s3_options(port)


def test_session_that_moved_continues_token_by_token_as_one_that_never_left(
    tmp_path: Path, place: tuple[str, dict[str, object]]
) -> None:
    url, options = place
    with (
        small_store(tmp_path / "a") as store,
        RemoteSessions(url, owner="a", options=options) as remote,
    ):
        save_model_session(store, "chat", 3, tmp_path)
        report = remote.publish(store, "chat")
        remote.release("chat")
    assert report.num_blocks == report.written_blocks == 65 // CHUNK_TOKENS
    with (
        small_store(tmp_path / "b") as store,
        RemoteSessions(url, owner="b", options=options) as remote,
    ):
        assert remote.fetch(store, "chat").num_tokens == 65
        assert_model_continues(store, "chat", 3, tmp_path)
        remote.delete("chat")


def test_prefix_of_a_session_that_moved_is_reused(
    tmp_path: Path, place: tuple[str, dict[str, object]]
) -> None:
    url, options = place
    with RemoteSessions(url, options=options) as remote:
        with small_store(tmp_path / "a") as store:
            save_model_session(store, "chat", 4, tmp_path)
            remote.publish(store, "chat")
            ids = store.describe("chat").token_ids
        with small_store(tmp_path / "b") as store:
            remote.fetch(store, "chat")
            with OffloadedCache(
                ["gpu", "cpu", "disk"],
                capacity=CAPACITY,
                disk_path=tmp_path / "disk",
                chunk_tokens=CHUNK_TOKENS,
            ) as cache:
                assert cache.reuse(torch.as_tensor(ids), make_llama(), store=store) == 64
        remote.delete("chat")


def test_session_of_another_tenant_is_not_opened_by_this_one(
    tmp_path: Path, place: tuple[str, dict[str, object]]
) -> None:
    url, options = place
    with RemoteSessions(url, options=options) as remote:
        with small_store(tmp_path / "a", salt="first") as store:
            save_model_session(store, "chat", 5, tmp_path)
            remote.publish(store, "chat")
        with small_store(tmp_path / "b", salt="second") as store:
            remote.fetch(store, "chat")
            with pytest.raises(NamespaceMismatch, match="salt"):
                OffloadedCache.load("chat", make_llama(), store=store)
        remote.delete("chat")
