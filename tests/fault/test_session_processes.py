"""Several processes on one root: nothing torn or wrong, never above the quota, never stuck."""

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Self

import pytest

from offload.errors import ConfigError, SessionInUse, SessionNotFound
from offload.sessions import changing
from offload.sessions.rebuild import rebuild
from offload.sessions.root import Root
from offload.sessions.session_file import SessionFile, read_session_file
from offload.sessions.store import SessionStore
from tests.support.recipes import (
    BLOCK_BYTES,
    Recipe,
    assert_clean,
    data_bytes,
    physical_bytes,
    quota_for,
    reading,
    save,
)

_CHECKOUT = Path(__file__).parents[2]
_GRACE_S = 60.0


class Crowd:
    """Workers in processes of their own, and what they say; see ``tests.support.crowd_worker``.

    Parameters
    ----------
    root : Path
    num_workers : int
    seconds : float
    seed : int
    """

    def __init__(self, root: Path, num_workers: int, seconds: float, seed: int) -> None:
        self._root = root
        self._seconds = seconds
        arguments = [str(value) for value in (root, num_workers, seconds, seed)]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.crowd_worker", *arguments],
            stdout=subprocess.PIPE,
            cwd=_CHECKOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.pids = [int(self._hear()["pid"]) for _ in range(num_workers)]
        self.most_bytes = 0
        self.most_data_bytes = 0

    def watch(self, done: threading.Event) -> None:
        """Note the most that the root takes up, again and again until an event is set."""
        while not done.is_set():
            self.most_bytes = max(self.most_bytes, physical_bytes(self._root))
            self.most_data_bytes = max(self.most_data_bytes, data_bytes(self._root))

    def kill_last_after(self, seconds: float) -> None:
        """Kill one worker after a while, unless somebody has something to say before."""
        assert self._process.stdout is not None
        select.select([self._process.stdout], [], [], seconds)
        os.kill(self.pids[-1], signal.SIGKILL)

    def finish(self) -> list[dict[str, Any]]:
        """Wait for all workers, and return what they have to say."""
        output, _ = self._process.communicate(timeout=self._seconds + _GRACE_S)
        return [json.loads(line) for line in output.splitlines()]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._process.wait(_GRACE_S)

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        event: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert "error" not in event, event["error"]
        return event


@contextmanager
def _watching(crowd: Crowd) -> Iterator[None]:
    done = threading.Event()
    thread = threading.Thread(target=crowd.watch, args=(done,))
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _run(tmp_path: Path, num_workers: int, seconds: float, num_blocks: int) -> None:
    room = num_blocks * BLOCK_BYTES
    root, quota = tmp_path / "root", quota_for(room)
    SessionStore(root, quota=quota, min_free=0).close()
    with Crowd(root, num_workers + 1, seconds, seed=num_workers) as crowd, _watching(crowd):
        # The one more dies half way.
        crowd.kill_last_after(seconds / 2)
        reports = crowd.finish()
    assert [report["error"] for report in reports if "error" in report] == []
    assert len(reports) == num_workers
    counts = sum((Counter(report["counts"]) for report in reports), Counter[str]())
    print(
        f"\n{num_workers} processes, {seconds} s: {dict(counts)}; "
        f"slowest {max(report['slowest_s'] for report in reports):.2f} s; "
        f"at most {crowd.most_bytes} of {quota} bytes, {crowd.most_data_bytes} of {room} for data"
    )
    assert crowd.most_bytes <= quota
    assert room / 2 < crowd.most_data_bytes <= room
    assert min(counts[what] for what in ("save", "load", "find_prefix", "chunks found")) > 0
    with closing(SessionStore(root)) as store:
        assert_clean(store)


def test_two_processes_and_one_that_is_killed_read_only_what_was_saved(tmp_path: Path) -> None:
    _run(tmp_path, num_workers=2, seconds=3, num_blocks=25)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_eight_processes_for_minutes_read_only_what_was_saved(tmp_path: Path) -> None:
    _run(tmp_path, num_workers=8, seconds=180, num_blocks=40)


_LOOK = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1])
print(*(name for (name,) in db.execute("SELECT name FROM sessions ORDER BY name")))
db.close()
"""


def _look_from_outside(root: Path) -> list[str]:
    """Return the sessions that another process sees. It takes itself for the last one if it can."""
    command = [sys.executable, "-c", _LOOK, str(root / "catalog.sqlite3")]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


def test_second_store_on_a_root_does_not_take_the_locks_of_the_first(tmp_path: Path) -> None:
    """Scenario: closing any descriptor of the catalog drops all POSIX locks that a process has on
    it; another process then takes itself for the last one, and removes the log under the first.
    """
    root = tmp_path / "root"
    with closing(SessionStore(root, quota="64MiB", min_free=0)) as store:
        save(store, "a", Recipe(1))
        SessionStore(root).close()
        assert _look_from_outside(root) == ["a"]
        save(store, "b", Recipe(2))
        assert _look_from_outside(root) == ["a", "b"]
    assert _look_from_outside(root) == ["a", "b"]


def test_root_in_use_is_not_rebuilt(tmp_path: Path) -> None:
    with (
        closing(SessionStore(tmp_path / "root")),
        pytest.raises(SessionInUse, match="in use by another"),
    ):
        rebuild(tmp_path / "root")


def test_session_that_is_replaced_while_it_is_opened_is_opened_as_it_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenario: the old file goes between the look into the catalog and the reading of the file."""
    pending = [Recipe(2), Recipe(3)]
    with (
        reading(tmp_path / "reader") as reader,
        closing(SessionStore(tmp_path / "root", quota="64MiB", min_free=0)) as store,
        closing(SessionStore(tmp_path / "root")) as other,
    ):

        def read(root: Root, identity: str) -> SessionFile:
            if pending:
                save(other, "a", pending.pop(0))
            return read_session_file(root.paths.session(identity))

        save(store, "a", Recipe(1))
        monkeypatch.setattr(Root, "read_session", read)
        reader.check(store, "a", Recipe(3))
        other.close()
        assert_clean(store)


def test_session_that_is_deleted_while_it_is_opened_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        closing(SessionStore(tmp_path / "root", quota="64MiB", min_free=0)) as store,
        closing(SessionStore(tmp_path / "root")) as other,
    ):

        def read(root: Root, identity: str) -> SessionFile:
            other.delete("a", force=True)
            return read_session_file(root.paths.session(identity))

        save(store, "a", Recipe(1))
        monkeypatch.setattr(Root, "read_session", read)
        with pytest.raises(SessionNotFound):
            store.open("a")
        other.close()
        assert_clean(store)


def test_changes_of_two_processes_at_once_are_both_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scenario: one pins a session while the other has begun to rename it."""
    with (
        closing(SessionStore(tmp_path / "root", quota="64MiB", min_free=0)) as store,
        closing(SessionStore(tmp_path / "root")) as other,
    ):
        save(store, "a", Recipe(1))
        real = changing._reserve_copy

        def reserve(root: Root, identity: str) -> str:
            monkeypatch.setattr(changing, "_reserve_copy", real)
            other.pin("a")
            return real(root, identity)

        monkeypatch.setattr(changing, "_reserve_copy", reserve)
        store.rename("a", "b")
        [info] = store.list()
        assert (info.name, info.is_pinned) == ("b", True)
        assert (store.describe("b").name, store.describe("b").is_pinned) == ("b", True)
        other.close()
        assert_clean(store)


def test_session_cannot_be_renamed_over_another_that_appears_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        reading(tmp_path / "reader") as reader,
        closing(SessionStore(tmp_path / "root", quota="64MiB", min_free=0)) as store,
        closing(SessionStore(tmp_path / "root")) as other,
    ):
        save(store, "a", Recipe(1))
        real = changing._reserve_copy

        def reserve(root: Root, identity: str) -> str:
            save(other, "b", Recipe(2))
            return real(root, identity)

        monkeypatch.setattr(changing, "_reserve_copy", reserve)
        with pytest.raises(ConfigError, match="there is a session 'b' already"):
            store.rename("a", "b")
        reader.check(store, "a", Recipe(1))
        reader.check(store, "b", Recipe(2))
        other.close()
        assert_clean(store)
