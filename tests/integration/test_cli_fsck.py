"""``offload fsck`` on real stores, through the command line."""

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from offload.cli import main
from offload.sessions.session_file import read_session_file, renamed, write_session_file
from tests.support.sessions import make_content, make_token_ids, read_back, save, small_store

_TOKENS = make_token_ids(30, seed=1)

Check = Callable[..., dict[str, Any]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with a session, a longer one that begins alike, and one on its own."""
    with small_store(tmp_path / "root") as store:
        save(store, "short", make_content(2, 1, token_ids=_TOKENS))
        save(store, "long", make_content(3, 1, token_ids=_TOKENS))
        save(store, "other", make_content(2, 2, rows=2))
    return tmp_path / "root"


@pytest.fixture
def check(root: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Run ``offload fsck`` on the root, and return the exit status and what it prints as JSON."""

    def run(*options: str) -> dict[str, Any]:
        capsys.readouterr()
        status = main(["fsck", str(root), *options, "--json"])
        data: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert data["is_clean"] == (status == 0)
        return data | {"status": status}

    return run


@pytest.fixture
def say(root: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, list[str]]]:
    """Run ``offload fsck`` on the root, and return the exit status and the lines it prints."""

    def run(*options: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        status = main(["fsck", str(root), *options])
        return status, [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return run


def segment_of(root: Path, name: str) -> Path:
    with small_store(root) as store:
        segment = next(iter(store.describe(name).segments))
    return root / "segments" / segment[:2] / f"{segment}.kvseg"


def file_of(root: Path, name: str) -> Path:
    with small_store(root) as store:
        identity = store.describe(name).identity
    return root / "sessions" / identity[:2] / f"{identity}.kvsession"


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def listing(root: Path) -> list[tuple[object, ...]]:
    """Return what is listed, but for when it was used."""
    with small_store(root) as store:
        return [
            (info.name, info.num_tokens, info.num_bytes, info.own_bytes, info.created_at)
            for info in store.list()
        ]


def test_fsck_of_a_good_root_exits_0_and_says_what_was_read(
    say: Callable[..., tuple[int, list[str]]], check: Check
) -> None:
    status, lines = say()
    assert status == 0
    assert lines[-1] == "clean"
    assert any(line.startswith("checked 3 sessions, 21 chunks, 252 KiB in ") for line in lines)
    data = check()
    assert (data["num_sessions"], data["num_chunks"]) == (3, 21)
    assert data["accounted_bytes"] == data["physical_bytes"] > data["num_bytes"] == 21 * 3 * 4096
    assert data["rebuilt"] is None


def test_fsck_finds_a_flipped_byte_and_repair_leaves_nothing_to_find(
    root: Path, check: Check
) -> None:
    path = segment_of(root, "short")
    flip(path, 3 * 3 * 4096 + 5000)
    found = check()
    [record] = found["bad_records"]
    assert (found["status"], found["is_repaired"]) == (1, False)
    assert (record["file"], record["index"], record["was_known"]) == (str(path), 3, False)
    assert record["sessions"] == ["long", "short"]
    assert "layer 1, token 16" in record["reason"]
    assert found["damaged_sessions"] == []
    repaired = check("--repair")
    assert (repaired["status"], repaired["is_repaired"]) == (1, True)
    assert repaired["damaged_sessions"] == ["long", "short"]
    again = check()
    [record] = again["bad_records"]
    assert (again["status"], record["was_known"]) == (0, True)
    assert record["reason"].startswith("already quarantined: chunk ")
    assert main(["sessions", "delete", "long", "short", "--root", str(root)]) == 0
    assert check()["bad_records"] == []


def test_fsck_after_a_repair_says_what_was_done_and_what_is_left(
    root: Path, say: Callable[..., tuple[int, list[str]]]
) -> None:
    path = segment_of(root, "other")
    flip(path, 5000)
    status, lines = say()
    assert status == 1
    assert any(line.startswith(f"{path.name} │ 0 │ other │ chunk ") for line in lines)
    assert lines[-1] == "--repair sets aside what is bad, and removes what nobody knows"
    status, lines = say("--repair")
    assert status == 1
    assert "records quarantined: 1" in lines
    assert lines[-1].startswith("damaged sessions cannot be opened")
    status, lines = say()
    assert status == 0
    assert "clean" in lines
    assert "damaged sessions other" in lines
    assert "bad records 1, 1 of them in quarantine before" in lines


def test_fsck_finds_new_damage_beside_what_is_in_quarantine(root: Path, check: Check) -> None:
    path = segment_of(root, "other")
    flip(path, 5000)
    check("--repair")
    flip(path, 3 * 4096 + 5000)
    found = check()
    assert found["status"] == 1
    new = [record["index"] for record in found["bad_records"] if not record["was_known"]]
    assert new == [1]


def test_fsck_repairs_a_damaged_session_file_by_forgetting_the_session(
    root: Path, check: Check, say: Callable[..., tuple[int, list[str]]]
) -> None:
    path = file_of(root, "long")
    flip(path, 20)
    found = check()
    assert found["status"] == 1
    assert f"{path}: header checksum" in found["bad_sessions"]["long"]
    status, lines = say("--repair")
    assert status == 1
    assert "sessions quarantined with their files: 1" in lines
    assert check()["status"] == 0
    assert [row[0] for row in listing(root)] == ["other", "short"]
    assert (root / "quarantine" / path.name).exists()


def test_fsck_removes_files_that_nobody_knows_when_told_to(
    root: Path, check: Check, say: Callable[..., tuple[int, list[str]]]
) -> None:
    path = file_of(root, "long").with_name(f"{'0' * 32}.kvsession")
    path.write_bytes(b"x" * 5000)
    assert check()["orphans"] == [str(path)]
    status, lines = say("--repair")
    assert status == 1
    assert f"nobody knows {path}" in lines
    assert "files removed: 1" in lines
    assert not path.exists()
    assert check()["status"] == 0


def test_fsck_rebuilds_a_lost_catalog_only_when_told_to(root: Path, check: Check) -> None:
    before = listing(root)
    catalog = root / "catalog.sqlite3"
    catalog.unlink()
    found = check("--repair")
    assert found["status"] == 1
    assert "is missing or empty" in found["catalog_errors"][0]
    rebuilt = check("--rebuild")
    assert rebuilt["status"] == 0
    assert rebuilt["rebuilt"]["num_sessions"] == 3
    assert listing(root) == before
    with small_store(root) as store:
        assert read_back(store, "other")


def change_catalog(root: Path, statement: str, *values: object) -> None:
    with closing(sqlite3.connect(root / "catalog.sqlite3")) as db, db:
        assert db.execute(statement, values).rowcount == 1


@pytest.mark.parametrize(
    "change",
    [
        "num_tokens = 3",
        "name = 'wrong'",
        "name = CAST(X'6c6f6eff' AS TEXT)",
        "is_pinned = 1",
        "expires_at = 1.0",
        "expires_at = X'00'",
        "namespace = X'00'",
        "file_bytes = 'many'",
        "checksum = 0",
    ],
)
@pytest.mark.parametrize("option", ["--repair", "--rebuild"])
def test_fsck_brings_a_session_with_a_damaged_row_back_from_its_file(
    change: str, option: str, root: Path, check: Check, say: Callable[..., tuple[int, list[str]]]
) -> None:
    before = listing(root)
    change_catalog(root, f"UPDATE sessions SET {change} WHERE name = 'long'")
    found = check()
    [error] = found["catalog_errors"]
    assert error.startswith("session 'long': ")
    assert (found["num_sessions"], found["num_chunks"], found["orphans"]) == (3, 21, [])
    status, lines = say(option)
    assert status == (option == "--repair")
    assert ("sessions restored from their files: long" in lines) == (option == "--repair")
    assert "--rebuild makes a new catalog from the files" not in lines
    assert check()["status"] == 0
    assert listing(root) == before
    with small_store(root) as store:
        assert read_back(store, "long")


@pytest.mark.parametrize("identity", ["0" * 32, "short", b"\xff"])
def test_fsck_repair_keeps_a_session_whose_row_has_lost_its_identity_for_a_rebuild(
    identity: str | bytes, root: Path, check: Check
) -> None:
    before = listing(root)
    change_catalog(root, "UPDATE sessions SET id = ? WHERE name = 'long'", identity)
    found = check("--repair")
    assert found["status"] == 1
    assert len(found["catalog_errors"]) == 1
    assert (found["bad_sessions"], found["orphans"]) == ({}, [])
    assert check("--rebuild")["status"] == 0
    assert listing(root) == before


def test_fsck_does_not_restore_a_session_whose_name_another_has_by_now(
    root: Path, check: Check
) -> None:
    """Scenario: a crash left the file one change ahead; then somebody took the name."""
    path = file_of(root, "long")
    renamed_to_other = renamed(read_session_file(path), name="other")
    write_session_file(path, renamed_to_other, sync=False)
    change_catalog(root, "UPDATE sessions SET num_tokens = 3 WHERE name = 'long'")
    found = check("--repair")
    assert (found["status"], found["restored"]) == (1, [])
    assert "session 'other': catalog: a row of sessions" in found["catalog_errors"][0]
    with small_store(root) as store:
        assert store.info("other").num_rows == 2


@pytest.mark.parametrize("damage", ["header", "row"])
def test_fsck_of_a_damaged_catalog_says_how_to_mend_it(
    damage: str, root: Path, check: Check, say: Callable[..., tuple[int, list[str]]]
) -> None:
    before = listing(root)
    if damage == "header":
        flip(root / "catalog.sqlite3", 0)
    else:
        change_catalog(root, "UPDATE sessions SET num_tokens = 3 WHERE name = 'long'")
    status, lines = say()
    assert status == 1
    assert "catalog damaged" in lines
    assert lines[-1] == "--rebuild makes a new catalog from the files"
    assert check("--rebuild")["status"] == 0
    assert listing(root) == before


def test_fsck_rebuild_that_sets_a_session_aside_exits_1_and_names_it(
    root: Path, check: Check, say: Callable[..., tuple[int, list[str]]]
) -> None:
    path = file_of(root, "long")
    flip(path, 20)
    status, lines = say("--rebuild")
    assert status == 1
    assert any(line.startswith(f"set aside: {path}: header checksum") for line in lines)
    assert [row[0] for row in listing(root)] == ["other", "short"]
    assert check("--rebuild")["status"] == 0


def test_fsck_rebuild_of_a_root_in_use_is_refused(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with small_store(root):
        assert main(["fsck", str(root)]) == 0
        assert main(["fsck", str(root), "--rebuild"]) == 2
    expected = f"offload: {root} is in use by another cache or process"
    assert capsys.readouterr().err.splitlines()[-1] == expected


def test_fsck_with_many_findings_shows_the_first_and_counts_the_others(
    root: Path, check: Check, say: Callable[..., tuple[int, list[str]]]
) -> None:
    with small_store(root) as store:
        save(store, "large", make_content(30, 3))
    segment_of(root, "large").unlink()
    assert len(check()["bad_records"]) == 90
    _, lines = say()
    assert sum("│ large │" in line for line in lines) == 20
    assert any(line.startswith("… and 70 more; --json shows all") for line in lines)


def test_fsck_of_a_missing_root_says_so_and_makes_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "nowhere"
    assert main(["fsck", str(root), "--rebuild", "--repair"]) == 2
    expected = f"offload: {root} does not exist; name the root of a session store\n"
    assert capsys.readouterr().err == expected
    assert not root.exists()
