"""Processes that are killed while they work on a session store, and what they leave behind.

Random moments, and every step of every operation. The long forms (``-m soak``) are the ones whose
results are in ``docs/sessions.md``.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from offload.sessions.store import SessionStore
from tests.support.kill_worker import Event, Operation, Zygote, perform
from tests.support.model_sessions import assert_model_continues
from tests.support.recipes import (
    BLOCK_BYTES,
    Reader,
    Recipe,
    assert_clean,
    quota_for,
    reading,
    same_file,
    save,
)

_QUOTA = quota_for(24 * BLOCK_BYTES)
_MAX_DELAY_S = 0.012
_MAX_OPERATIONS = 6
_NEED_ROOM = ("save", "save_model", "rename", "pin")
"""Operations that may evict sessions. A new name is a second file, until the first one goes."""


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as started:
        yield started


@dataclass
class Expected:
    """What must be in a store, by what its writer has said.

    Attributes
    ----------
    sessions : dict
        Recipe, or seed of a model session, by name.
    pinned : set of str
    """

    sessions: dict[str, Recipe | int] = field(default_factory=dict)
    pinned: set[str] = field(default_factory=set)

    def after(self, operation: Operation) -> "Expected":
        """Return what there is if an operation is done, and nothing is evicted."""
        sessions, pinned = dict(self.sessions), set(self.pinned)
        name, done = operation.get("name", ""), operation["do"]
        if done == "save":
            sessions[name] = Recipe(**operation["recipe"])
        if done == "save_model":
            sessions[name] = operation["seed"]
        if done == "delete":
            del sessions[name]
        if done == "rename":
            sessions[operation["to"]] = sessions.pop(name)
        is_pinned = operation.get("pin", name in pinned and not done.startswith("save"))
        pinned.discard(name)
        if is_pinned and done != "delete":
            pinned.add(str(operation.get("to", name)))
        return Expected(sessions, pinned)

    def without(self, names: set[str]) -> "Expected":
        """Return the rest, after an eviction."""
        assert not names & self.pinned, f"pinned sessions {names & self.pinned} were evicted"
        left = {name: value for name, value in self.sessions.items() if name not in names}
        return Expected(left, self.pinned)

    def hear(self, events: list[Event]) -> tuple[list["Expected"], bool]:
        """Return what may be there after a writer has said so much, and if sessions may be gone.

        One, or before and after an operation that was under way.
        """
        state, under_way = self, None
        for event in events:
            if "begin" in event:
                under_way = event["begin"]
            if "names" in event:
                if under_way is not None and event["done"]:
                    state = state.after(under_way)
                lost = set(state.sessions) - set(event["names"])
                assert not lost or (under_way or {}).get("do") in _NEED_ROOM, (lost, under_way)
                state, under_way = state.without(lost), None
                assert set(state.sessions) == set(event["names"]), event
        if under_way is None:
            return [state], False
        return [state, state.after(under_way)], under_way["do"] in _NEED_ROOM


def _find_out(store: SessionStore, candidates: list[Expected], may_evict: bool) -> Expected:
    """Return which of the candidates the store holds, perhaps after evictions."""
    infos = {info.name: info for info in store.list()}
    pinned = {name for name, info in infos.items() if info.is_pinned}
    for expected in reversed(candidates):
        lost = set(expected.sessions) - set(infos)
        if lost and (lost & expected.pinned or not may_evict):
            continue
        left = expected.without(lost)
        if left.sessions.keys() == set(infos) and left.pinned == pinned and _holds(store, left):
            return left
    raise AssertionError(f"{sorted(infos)}, pinned {pinned}, is none of {candidates}")


def _holds(store: SessionStore, expected: Expected) -> bool:
    return all(
        isinstance(recipe, int) or same_file(store.describe(name), recipe)
        for name, recipe in expected.sessions.items()
    )


def _check(
    root: Path,
    candidates: list[Expected],
    reader: Reader,
    *,
    may_evict: bool = False,
    scratch: Path | None = None,
) -> Expected:
    """Open a store whose writer was killed, and compare all of it; return what is in it."""
    with SessionStore(root) as store:
        assert_clean(store)
        found = _find_out(store, candidates, may_evict)
        for name, recipe in found.sessions.items():
            if isinstance(recipe, Recipe):
                reader.check(store, name, recipe)
                if recipe.has_tokens:
                    assert reader.check_prefix(store, recipe) == recipe.num_chunks
            elif scratch is not None:
                assert_model_continues(store, name, recipe, scratch)
        assert_clean(store)
    return found


def _run_and_kill(zygote: Zygote, rng: random.Random, **order: Any) -> list[Event]:
    """Let a child work for a while and kill it, wherever it is; return what it has said."""
    pid = zygote.order(task="work", seed=rng.getrandbits(32), **order)
    events: list[Event] = []
    num_operations = rng.randint(0, _MAX_OPERATIONS)
    while num_operations:
        events.append(zygote.hear())
        num_operations -= "names" in events[-1]
    until = time.perf_counter() + rng.uniform(0, _MAX_DELAY_S)
    while time.perf_counter() < until:
        pass
    os.kill(pid, signal.SIGKILL)
    return events + zygote.hear_all()


def _kill_again_and_again(tmp_path: Path, zygote: Zygote, count: int, model_every: int = 0) -> None:
    root, scratch = tmp_path / "root", tmp_path / "scratch"
    SessionStore(root, quota=_QUOTA, min_free=0).close()
    rng, expected = random.Random(1), Expected()
    with reading(tmp_path / "reader") as reader:
        for number in range(count):
            is_model = bool(model_every) and number % model_every == 0
            order = {"model_scratch": str(scratch)} if is_model else {}
            events = _run_and_kill(zygote, rng, root=str(root), **order)
            candidates, may_evict = expected.hear(events)
            expected = _check(
                root,
                candidates,
                reader,
                may_evict=may_evict,
                scratch=scratch if is_model else None,
            )


def test_killed_writer_leaves_every_reported_session_and_nothing_else(
    tmp_path: Path, zygote: Zygote
) -> None:
    _kill_again_and_again(tmp_path, zygote, count=25)


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_thousand_kills_leave_every_reported_session_and_tokens_identical(
    tmp_path: Path, zygote: Zygote
) -> None:
    _kill_again_and_again(tmp_path, zygote, count=1000, model_every=10)


_OLD = {
    "a": Recipe(1, num_chunks=4, shared_chunks=2),
    "b": Recipe(2, num_chunks=3, shared_chunks=2),
    "c": Recipe(3, num_chunks=3, has_tokens=False),
}
_FIELDS: dict[str, Any] = {"num_chunks": 3, "shared_chunks": 1}
_OPERATIONS: dict[str, Operation] = {
    "save": {"do": "save", "name": "d", "recipe": {"seed": 4, **_FIELDS}, "pin": False},
    "replace": {"do": "save", "name": "a", "recipe": {"seed": 5, **_FIELDS}, "pin": True},
    "evict": {"do": "save", "name": "d", "recipe": {"seed": 6, "num_chunks": 9}, "pin": False},
    "delete a whole file": {"do": "delete", "name": "c"},
    "delete and punch": {"do": "delete", "name": "a"},
    "rename": {"do": "rename", "name": "a", "to": "x"},
    "pin": {"do": "pin", "name": "b", "pin": True},
    "open": {"do": "open", "name": "b"},
    "start": {"do": "start"},
    "stop": {"do": "stop"},
    "rebuild": {"do": "rebuild"},
}


def _make_old(root: Path) -> None:
    """Make a root with three sessions, used in the order c, a, b."""
    with SessionStore(root, quota=quota_for(13 * BLOCK_BYTES), min_free=0) as store:
        for name in ("c", "a", "b"):
            save(store, name, _OLD[name])


def _kill_at_each_step(
    tmp_path: Path, zygote: Zygote, operation: Operation, first: int, stride: int
) -> int:
    """Do an operation again and again, killed at one step after the other; return how many."""
    _make_old(tmp_path / "old")
    before = Expected({**_OLD})
    with reading(tmp_path / "reader") as reader:
        step, is_done = first, False
        while not is_done:
            root = tmp_path / f"root-{step}"
            shutil.copytree(tmp_path / "old", root)
            zygote.order(
                task="stumble", root=str(root), operation=operation, step=step, durability="strict"
            )
            is_done = not os.WIFSIGNALED(zygote.hear_all()[-1]["ended"])
            states = [before, before.after(operation)][is_done:]
            _check(root, states, reader, may_evict=operation["do"] in _NEED_ROOM)
            shutil.rmtree(root)
            step += stride
    return step - stride


@pytest.mark.parametrize("what", _OPERATIONS)
def test_writer_killed_at_a_step_of_an_operation_has_done_it_or_not_begun(
    tmp_path: Path, zygote: Zygote, what: str
) -> None:
    first = 1 + list(_OPERATIONS).index(what) % 5
    assert _kill_at_each_step(tmp_path, zygote, _OPERATIONS[what], first, stride=7) > 1


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("what", _OPERATIONS)
def test_writer_killed_at_any_step_of_an_operation_has_done_it_or_not_begun(
    tmp_path: Path, zygote: Zygote, what: str
) -> None:
    assert _kill_at_each_step(tmp_path, zygote, _OPERATIONS[what], first=1, stride=1) > 5


def test_root_of_a_writer_that_was_killed_twice_is_cleaned_by_the_next(
    tmp_path: Path, zygote: Zygote
) -> None:
    """Scenario: the one that comes to clean up after a killed writer is killed as well."""
    root = tmp_path / "root"
    _make_old(root)
    for order in (
        {"operation": _OPERATIONS["save"], "step": 40},
        {"operation": {"do": "start"}, "step": 16},
    ):
        zygote.order(task="stumble", root=str(root), durability="relaxed", **order)
        assert os.WIFSIGNALED(zygote.hear_all()[-1]["ended"])
    with reading(tmp_path / "reader") as reader:
        _check(root, [Expected({**_OLD})], reader)


def test_rename_of_a_killed_writer_does_not_come_back_with_another_change(tmp_path: Path) -> None:
    """Scenario: the file of a session says one change more than the catalog; then it is pinned."""
    root = tmp_path / "root"
    _make_old(root)
    with SessionStore(root) as store:
        identity = store._root.identify("a")
        path = store._root.paths.session(identity)
        perform(store, _OPERATIONS["rename"])
        ahead = path.read_bytes()
        store.rename("x", "a")
        path.write_bytes(ahead)
        store.pin("a")
        assert [info.name for info in store.list()] == ["a", "b", "c"]
        assert (store.describe("a").name, store.describe("a").is_pinned) == ("a", True)


def test_store_without_its_catalog_is_rebuilt_when_it_is_opened(tmp_path: Path) -> None:
    """Scenario: a rebuild is killed between taking the old catalog away and naming the new one."""
    root = tmp_path / "root"
    _make_old(root)
    (root / "catalog.sqlite3").unlink()
    with reading(tmp_path / "reader") as reader, closing(SessionStore(root)) as store:
        for name, recipe in _OLD.items():
            reader.check(store, name, recipe)
