"""Stored responses and conversations: by tenant, private, and bounded."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from offload.daemon.http.errors import NotFound
from offload.daemon.http.pages import page_of
from offload.daemon.http.store import HttpStore, StoredAnswer, StoredResponse
from offload.daemon.http.tables import HttpTables
from offload.errors import StorageError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[HttpStore]:
    opened = HttpStore(tmp_path / "http", 1000.0, 100, 1 << 30)
    yield opened
    opened.close()


def response(name: str, previous: str | None = None) -> StoredResponse:
    output = [{"id": f"out-{name}", "type": "message"}]
    body: dict[str, Any] = {"id": name, "output": output}
    return StoredResponse(previous, "session", body, [{"id": f"in-{name}"}])


def test_history_of_a_response_is_that_of_all_before_it(store: HttpStore) -> None:
    store.put_response("alice", response("a"))
    store.put_response("alice", response("b", "a"))
    assert [item["id"] for item in store.history("alice", "b")] == [
        "in-a",
        "out-a",
        "in-b",
        "out-b",
    ]


def test_history_with_a_deleted_response_in_it_is_not_found(store: HttpStore) -> None:
    store.put_response("alice", response("a"))
    store.put_response("alice", response("b", "a"))
    store.delete_response("alice", "a")
    with pytest.raises(NotFound):
        store.history("alice", "b")


def test_response_of_another_tenant_is_not_found(store: HttpStore) -> None:
    store.put_response("alice", response("a"))
    with pytest.raises(NotFound):
        store.response("bob", "a")
    with pytest.raises(NotFound):
        store.delete_response("bob", "a")
    assert store.response("alice", "a").session == "session"


def conversation(store: HttpStore, tenant: str = "alice") -> None:
    store.put_conversation(tenant, {"id": "c", "metadata": {}})
    store.add_items(tenant, "c", [{"id": "1"}, {"id": "2"}])


def test_items_of_another_tenants_conversation_of_that_name_are_others(store: HttpStore) -> None:
    conversation(store)
    store.put_conversation("bob", {"id": "c", "metadata": {}})
    assert store.items("bob", "c") == []
    with pytest.raises(NotFound):
        store.delete_item("bob", "c", "1")


def test_conversation_that_is_deleted_takes_its_items_along(store: HttpStore) -> None:
    conversation(store)
    store.delete_conversation("alice", "c")
    store.put_conversation("alice", {"id": "c", "metadata": {}})
    assert store.items("alice", "c") == []


def test_item_that_is_added_again_keeps_its_place(store: HttpStore) -> None:
    conversation(store)
    store.add_items("alice", "c", [{"id": "1", "new": True}])
    assert store.items("alice", "c") == [{"id": "1", "new": True}, {"id": "2"}]


def test_answer_of_one_tenant_is_unknown_to_another(store: HttpStore) -> None:
    store.put_answer("alice", "key", StoredAnswer("s", "opening", b"1234"))
    assert store.answer("alice", "key") == ("opening", b"1234")
    assert store.answer("bob", "key") is None


def test_answers_of_a_session_that_is_deleted_are_forgotten(store: HttpStore) -> None:
    for tenant, session in (("alice", "s"), ("alice", "other"), ("bob", "s")):
        store.put_answer(tenant, session, StoredAnswer(session, "", b"1234"))
    store.forget_answers("alice", "s")
    found = [store.answer(*key) for key in (("alice", "s"), ("alice", "other"), ("bob", "s"))]
    assert [answer is None for answer in found] == [True, False, False]


def test_files_are_private(tmp_path: Path, store: HttpStore) -> None:
    store.put_response("alice", response("a"))
    folder = tmp_path / "http"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}


def test_rows_beyond_the_limit_go_least_recently_used_first(tmp_path: Path) -> None:
    store = HttpStore(tmp_path, 1000.0, 3, 1 << 30)
    for name in "abcde":
        store.put_response("alice", response(name))
    store.response("alice", "a")
    store.close()
    store = HttpStore(tmp_path, 1000.0, 3, 1 << 30)
    assert store.response("alice", "a")
    with pytest.raises(NotFound):
        store.response("alice", "b")
    store.close()


def test_rows_that_were_not_used_for_long_are_gone(tmp_path: Path) -> None:
    store = HttpStore(tmp_path, 1000.0, 10, 1 << 30)
    conversation(store)
    store.close()
    store = HttpStore(tmp_path, -1.0, 10, 1 << 30)
    with pytest.raises(NotFound):
        store.conversation("alice", "c")
    store.put_conversation("alice", {"id": "c", "metadata": {}})
    assert store.items("alice", "c") == []
    store.close()


def test_file_that_is_too_big_loses_a_tenth_of_its_rows(tmp_path: Path) -> None:
    store = HttpStore(tmp_path, 1000.0, 100, 1 << 30)
    for number in range(20):
        store.put_response("alice", response(str(number)))
    store.close()
    tables = HttpTables(tmp_path, 1000.0, 100, 1)
    assert tables.run("SELECT count(*) FROM responses") == [(18,)]
    tables.close()


def test_file_that_is_no_database_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "http.sqlite3").write_bytes(b"garbage" * 1000)
    with pytest.raises(StorageError) as caught:
        HttpStore(tmp_path, 1000.0, 100, 1 << 30)
    assert isinstance(caught.value.__cause__, sqlite3.Error)


ITEMS = [{"id": name} for name in "abcd"]


@pytest.mark.parametrize(
    ("after", "limit", "order", "expected", "has_more"),
    [
        (None, 2, "asc", "ab", True),
        ("b", 2, "asc", "cd", False),
        ("b", 5, "desc", "a", False),
        (None, 0, "desc", "dcba", False),
        ("d", 2, "asc", "", False),
    ],
)
def test_page_of_a_list_begins_after_the_last_one(
    after: str | None, limit: int, order: str, expected: str, has_more: bool
) -> None:
    page = page_of(ITEMS, after, limit, order)
    assert "".join(item["id"] for item in page["data"]) == expected
    assert page["has_more"] is has_more
    assert page["first_id"] == expected[:1]
    assert page["last_id"] == expected[-1:]


def test_page_after_an_item_that_is_not_there_is_not_found() -> None:
    with pytest.raises(NotFound):
        page_of(ITEMS, "z", 2, "asc")
