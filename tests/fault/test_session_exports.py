"""Exports that are killed, and those beside them: none leaves anything, none disturbs another."""

import fcntl
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from offload.sessions import new_file
from tests.support.sessions import make_content, save, small_store

_CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a test exports to."""
    path = tmp_path / "folder"
    path.mkdir()
    return path


_KILLED = """
import os, signal, sys
from offload.sessions.store import SessionStore
with SessionStore(sys.argv[1]) as store:
    store.export("chat", sys.argv[2], lambda done, total: os.kill(os.getpid(), signal.SIGKILL))
"""


def test_export_removes_what_one_that_was_killed_has_left(folder: Path, tmp_path: Path) -> None:
    (folder / ".kv-export-mine.tmp").touch()
    with small_store(tmp_path / "root") as store:
        save(store, "chat", make_content(4, 1))
        command = [sys.executable, "-c", _KILLED, str(store.path), str(folder / "a")]
        assert subprocess.run(command, cwd=_CHECKOUT, check=False).returncode == -signal.SIGKILL
        assert len(list(folder.glob(".kv-export-*"))) == 2
        store.export("chat", folder / "b")
    assert {entry.name for entry in folder.iterdir()} == {".kv-export-mine.tmp", "b"}


def test_export_does_not_disturb_another_to_the_same_folder(folder: Path, tmp_path: Path) -> None:
    with small_store(tmp_path / "root") as store:
        save(store, "chat", make_content(4, 1))

        def export_another(done: int, total: int) -> None:
            if done == 1:
                store.export("chat", folder / "b")
                assert len(list(folder.glob(".kv-export-*"))) == 1

        store.export("chat", folder / "a", export_another)
    assert {entry.name for entry in folder.iterdir()} == {"a", "b"}
    assert (folder / "a").read_bytes() == (folder / "b").read_bytes()


def test_export_that_is_taken_for_dead_before_it_has_its_lock_begins_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, pending = fcntl.flock, [folder]

    def flock(fd: int, operation: int) -> None:
        if pending:
            new_file._remove_abandoned(pending.pop())
        real(fd, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with new_file.new_file(folder / "a", sync=False) as file:
        file.write(b"content")
        assert len(list(folder.glob(".kv-export-*"))) == 1
    assert [entry.name for entry in folder.iterdir()] == ["a"]
    assert (folder / "a").read_bytes() == b"content"
