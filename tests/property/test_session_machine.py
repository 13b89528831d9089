"""Any sequence of calls on a session store, against a dictionary of what was saved.

The model knows which chunks sessions share and in which segment each lies, and with that, to the
byte, what the store must take up, and whether an eviction was due.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from offload.errors import ConfigError, DiskFull, SessionInUse, SessionNotFound
from offload.sessions.ledger import OVERHEAD_BYTES
from offload.sessions.rebuild import rebuild
from offload.sessions.saving import _CATALOG_BLOCK_BYTES
from offload.sessions.store import SessionStore
from tests.support.recipes import (
    BLOCK_BYTES,
    FILE_BYTES,
    LAYOUT,
    Reader,
    Recipe,
    assert_clean,
    physical_bytes,
    quota_for,
    save,
)

if TYPE_CHECKING:
    from offload.sessions.opening import Held

ROOM_BYTES = 9 * BLOCK_BYTES
NAMES = st.sampled_from("abcde")
RECIPES = st.builds(
    Recipe,
    seed=st.integers(0, 3),
    num_chunks=st.sampled_from([0, 2, 3, 4, 5]),
    shared_chunks=st.sampled_from([0, 2, 3, 4]),
    num_rows=st.sampled_from([1, 1, 1, 2]),
    has_tokens=st.booleans(),
)

Block = bytes | tuple[int, int, int]
"""The tokens that a chunk follows from; of a session without tokens, which save, row, position."""


@dataclass
class Session:
    """One session of the model."""

    recipe: Recipe
    blocks: frozenset[Block]
    is_pinned: bool


class SessionMachine(RuleBasedStateMachine):
    """Holds for every name what was saved under it last, and who has it open."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="session-machine-"))
        self.root = self.folder / "root"
        self.reader = Reader(self.folder / "reader")
        self.sessions: dict[str, Session] = {}
        self.segment_of: dict[Block, int] = {}
        self.held: list[tuple[Session, Held, frozenset[int]]] = []
        self.garbage: dict[int, set[Block]] = {}
        self.num_saves = 0

    @initialize()
    def make(self) -> None:
        quota = quota_for(ROOM_BYTES)
        self.store = SessionStore(self.root, quota=quota, min_free=0, durability="none")

    @rule(name=NAMES, recipe=RECIPES, pin=st.sampled_from([False, False, False, True]))
    def save(self, name: str, recipe: Recipe, pin: bool) -> None:
        before = dict(self.sessions)
        used_at = {info.name: info.used_at for info in self.store.list()}
        blocks = self._blocks_of(recipe)
        new = blocks - self.segment_of.keys()
        leased = self._leased() | {self.segment_of[block] for block in blocks - new}
        num_refs = recipe.num_chunks * recipe.num_rows
        needed = len(new) * BLOCK_BYTES + FILE_BYTES + num_refs * _CATALOG_BLOCK_BYTES
        missing = self._used() + needed - ROOM_BYTES
        evictable = [
            other
            for other, session in before.items()
            if other != name and not session.is_pinned and not self._is_open(session)
        ]
        try:
            save(self.store, name, recipe, pin=pin)
        except DiskFull:
            assert self._gain(set(evictable), leased) < missing
            return
        left = {info.name for info in self.store.list()}
        victims = sorted(set(before) - left - {name}, key=used_at.__getitem__)
        assert set(victims) <= set(evictable)
        spared = [used_at[other] for other in evictable if other in left]
        assert not victims or used_at[victims[-1]] <= min(spared, default=float("inf"))
        assert bool(victims) == (missing > 0)
        if victims and len(victims) < len(evictable):
            assert sum(self._gain({victim}, leased) for victim in victims[:-1]) < missing
        for victim in victims:
            del self.sessions[victim]
        for block in new:
            self.segment_of[block] = self.num_saves
        self.sessions[name] = Session(recipe, frozenset(blocks), pin)
        self._forget_dead(leased)
        self._sweep()

    @rule(name=NAMES, force=st.booleans())
    def delete(self, name: str, force: bool) -> None:
        session = self.sessions.get(name)
        if session is None:
            with pytest.raises(SessionNotFound):
                self.store.delete(name, force=force)
        elif self._is_open(session) and not force:
            with pytest.raises(SessionInUse):
                self.store.delete(name)
        else:
            self.store.delete(name, force=force)
            del self.sessions[name]
            self._forget_dead(self._leased())

    @rule(name=NAMES, new_name=NAMES)
    def rename(self, name: str, new_name: str) -> None:
        if name not in self.sessions:
            with pytest.raises(SessionNotFound):
                self.store.rename(name, new_name)
        elif new_name in self.sessions and new_name != name:
            with pytest.raises(ConfigError, match="already"):
                self.store.rename(name, new_name)
        elif self._has_room_for_a_file():
            self.store.rename(name, new_name)
            self.sessions[new_name] = self.sessions.pop(name)

    @rule(name=NAMES, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        if name not in self.sessions:
            with pytest.raises(SessionNotFound):
                self.store.pin(name, pinned)
        elif self._has_room_for_a_file():
            self.store.pin(name, pinned)
            self.sessions[name].is_pinned = pinned

    @rule(name=NAMES)
    def open(self, name: str) -> None:
        session = self.sessions.get(name)
        if session is None:
            with pytest.raises(SessionNotFound):
                self.store.open(name)
            return
        segments = frozenset(self.segment_of[block] for block in session.blocks)
        self.held.append((session, self.store.open(name)[1], segments))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def read_and_release(self, data: st.DataObject) -> None:
        """What is open stays readable, whatever has become of its name."""
        index = data.draw(st.integers(0, len(self.held) - 1))
        session, held, _ = self.held.pop(index)
        assert self.reader.payloads(held) == session.recipe.payloads
        held.release()
        held.release()
        self._sweep()

    @rule(recipe=RECIPES)
    def find_prefix(self, recipe: Recipe) -> None:
        if not recipe.has_tokens:
            return
        found = self.reader.check_prefix(self.store, recipe)
        known = [self._num_known(recipe, row) for row in range(recipe.num_rows)]
        assert found == min(known)

    @rule()
    def read_everything(self) -> None:
        for name, session in self.sessions.items():
            self.reader.check(self.store, name, session.recipe)

    @rule()
    def reopen(self) -> None:
        self._close()
        self.store = SessionStore(self.root, durability="none")
        assert_clean(self.store)

    @rule()
    def check(self) -> None:
        assert self.store.fsck(repair=True).is_clean

    @rule(keep_catalog=st.booleans())
    def rebuild(self, keep_catalog: bool) -> None:
        self._close()
        if not keep_catalog:
            (self.root / "catalog.sqlite3").unlink()
        report = rebuild(self.root)
        quota = None if keep_catalog else quota_for(ROOM_BYTES)
        min_free = None if keep_catalog else 0
        self.store = SessionStore(self.root, quota=quota, min_free=min_free, durability="none")
        assert (report.num_sessions, report.set_aside) == (len(self.sessions), {})
        assert_clean(self.store)

    @invariant()
    def is_as_expected(self) -> None:
        if not hasattr(self, "store"):
            return
        found = {info.name: info for info in self.store.list()}
        assert {name: info.is_pinned for name, info in found.items()} == {
            name: session.is_pinned for name, session in self.sessions.items()
        }
        for name, session in self.sessions.items():
            assert found[name].is_open == self._is_open(session)
        usage = self.store.usage()
        assert usage.used_bytes == OVERHEAD_BYTES + self._used()
        assert usage.garbage_bytes == sum(map(len, self.garbage.values())) * BLOCK_BYTES
        assert physical_bytes(self.root) <= usage.used_bytes <= usage.quota_bytes

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.read_everything()
            self.store.close()
        self.reader.close()
        shutil.rmtree(self.folder)

    def _close(self) -> None:
        self.store.close()
        self.held.clear()
        self._sweep()

    def _blocks_of(self, recipe: Recipe) -> set[Block]:
        self.num_saves += 1
        return {
            self._block(recipe, row, position)
            for row in range(recipe.num_rows)
            for position in range(recipe.num_chunks)
        }

    def _block(self, recipe: Recipe, row: int, position: int) -> Block:
        if not recipe.has_tokens:
            return self.num_saves, row, position
        end = (position + 1) * LAYOUT.chunk_tokens
        return bytes(recipe.token_ids[row, :end].numpy().tobytes())

    def _num_known(self, recipe: Recipe, row: int) -> int:
        for position in range(recipe.num_chunks):
            if self._block(recipe, row, position) not in self.segment_of:
                return position
        return recipe.num_chunks

    def _is_open(self, session: Session) -> bool:
        return any(session is other for other, _, _ in self.held)

    def _leased(self) -> set[int]:
        return {segment for _, _, segments in self.held for segment in segments}

    def _used(self) -> int:
        num_blocks = len(self.segment_of) + sum(map(len, self.garbage.values()))
        return num_blocks * BLOCK_BYTES + len(self.sessions) * FILE_BYTES

    def _has_room_for_a_file(self) -> bool:
        """Whether a change evicts nobody; evictions are for ``save`` to find out about."""
        return self._used() + FILE_BYTES + 4096 <= ROOM_BYTES

    def _gain(self, names: set[str], leased: set[int]) -> int:
        """Return the bytes that come back if sessions go."""
        others = {name: value for name, value in self.sessions.items() if name not in names}
        kept = {block for session in others.values() for block in session.blocks}
        gone = {
            block
            for name in names
            for block in self.sessions[name].blocks - kept
            if self.segment_of[block] not in leased
        }
        return len(gone) * BLOCK_BYTES + len(names) * FILE_BYTES

    def _forget_dead(self, leased: set[int]) -> None:
        alive = {block for session in self.sessions.values() for block in session.blocks}
        for block in set(self.segment_of) - alive:
            segment = self.segment_of.pop(block)
            if segment in leased:
                self.garbage.setdefault(segment, set()).add(block)

    def _sweep(self) -> None:
        leased = self._leased()
        self.garbage = {key: value for key, value in self.garbage.items() if key in leased}


TestSessions = SessionMachine.TestCase
TestSessions.settings = settings(stateful_step_count=40)
