"""Open a session, or the longest known beginning of some tokens, and hold on to its chunks."""

import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from offload.errors import CorruptCatalog, CorruptChunk, SessionNotFound
from offload.sessions import blocks
from offload.sessions.keys import chain_keys
from offload.sessions.leases import add_lease
from offload.sessions.namespace import parse_layout
from offload.sessions.root import Root
from offload.sessions.schema import check_session_row
from offload.sessions.session_file import BlockRef, SessionFile
from offload.tiers.sealing import Sealer
from offload.types import ChunkLayout


@dataclass(frozen=True, slots=True)
class Held:
    """Chunks of a store that stay in place until ``release``.

    Attributes
    ----------
    rows : tuple of tuple of BlockRef
    shapes : dict of str to (num_layers, num_positions)
        Of every segment in ``rows``.
    fingerprint : bytes
        What their records carry.
    """

    root: Root = field(repr=False)
    lease: str
    rows: tuple[tuple[BlockRef, ...], ...]
    shapes: dict[str, tuple[int, int]]
    fingerprint: bytes

    def place(self, ref: BlockRef, layer_number: int) -> tuple[Path, int]:
        """Return the file and the index of one layer's record."""
        _, num_positions = self.shapes[ref.segment]
        return self.root.paths.segment(ref.segment), layer_number * num_positions + ref.position

    @property
    def sealer(self) -> Sealer | None:
        """What their records are sealed with."""
        return self.root.sealer

    def release(self) -> None:
        """Let go of the chunks. Idempotent; closing the store does the same."""
        if self.root.is_open:
            self.root.drop_lease(self.lease)


def open_session(root: Root, name: str) -> tuple[SessionFile, Held]:
    """Return what a session's file says, and hold its chunks.

    Raises
    ------
    SessionNotFound
        There is none, or it has expired.
    CorruptChunk
        Its file is damaged, or one of its chunks is known to be.
    CorruptCatalog
    """
    while True:
        identity, lease, segments = _hold_session(root, name)
        held: Held | None = None
        try:
            file = root.read_session(identity)
            if file.identity != identity:
                raise CorruptChunk(f"the file of session {identity} is that of {file.identity}")
            if set(file.segments) != segments:
                raise CorruptCatalog(
                    f"session {name!r} lies in {sorted(file.segments)}, the catalog has "
                    f"{sorted(segments)}; `offload fsck --rebuild` makes a new one from the files"
                )
            shapes = dict(file.segments)
            held = Held(root, lease, file.rows, shapes, file.namespace.fingerprint)
        except CorruptChunk:
            if root.find(name) == identity:
                raise
            # Its file went because the session was deleted or replaced meanwhile.
        finally:
            if held is None:
                root.drop_lease(lease)
        if held is not None:
            return file, held


def describe_session(root: Root, name: str) -> SessionFile:
    """Return what a session's file says, and hold nothing.

    Raises
    ------
    SessionNotFound
    CorruptChunk
        The file is damaged.
    """
    while True:
        identity = root.identify(name)
        try:
            return root.read_session(identity)
        except CorruptChunk:
            if root.find(name) == identity:
                raise
            # It went because the session was deleted or replaced meanwhile.


def _hold_session(root: Root, name: str) -> tuple[str, str, set[str]]:
    """Return the identity of a session, a lease on its segments, and their names."""
    with root.catalog.transaction() as db:
        row = _find(db, root, name)
        identity = str(row[0])
        _refuse_damaged(db, identity, name)
        segments = db.execute(
            "SELECT DISTINCT g.id, g.name FROM session_blocks m JOIN blocks b ON b.id = m.block "
            "JOIN segments g ON g.id = b.segment WHERE m.session = ?",
            (identity,),
        ).fetchall()
        lease = add_lease(db, root.owner, identity, [number for number, _ in segments])
        db.execute("UPDATE sessions SET used_at = ? WHERE id = ?", (time.time(), identity))
    return identity, lease, {str(segment) for _, segment in segments}


def find_prefix(
    root: Root,
    model_digest: bytes,
    chunk_tokens: int,
    token_ids: Tensor,
    namespace_of: Callable[[ChunkLayout], bytes],
) -> tuple[ChunkLayout, Held] | None:
    """Find the longest beginning of some rows that the store has in full chunks, and hold it.

    Parameters
    ----------
    root : Root
    model_digest : bytes
        See ``Namespace.model_digest``.
    chunk_tokens : int
    token_ids : Tensor, int64 [num_rows, num_tokens]
    namespace_of : callable
        Returns the digest that the namespace must have, given the layout of its chunks.

    Returns
    -------
    (ChunkLayout, Held) or None
        Equally many chunks for every row; None if there are none.
    """
    with root.catalog.transaction() as db:
        candidates = db.execute(
            "SELECT digest, layout FROM namespaces WHERE model = ?", (model_digest,)
        ).fetchall()
        found: tuple[ChunkLayout, bytes, list[list[BlockRef]]] | None = None
        for digest, text in candidates:
            layout = parse_layout(text)
            if layout is None or layout.chunk_tokens != chunk_tokens:
                continue
            if namespace_of(layout) != digest:
                continue
            rows = _known_rows(db, root.first_key(digest), token_ids, chunk_tokens)
            if rows[0] and (found is None or len(rows[0]) > len(found[2][0])):
                found = layout, digest, rows
        if found is None:
            return None
        layout, digest, rows = found
        shapes, numbers = {}, []
        for name in {ref.segment for row in rows for ref in row}:
            number, num_layers, num_positions = blocks.segment_shape(db, name)
            shapes[name] = num_layers, num_positions
            numbers.append(number)
        lease = add_lease(db, root.owner, None, numbers)
        _touch_users(db, numbers)
    return layout, Held(root, lease, tuple(map(tuple, rows)), shapes, digest[:16])


def _known_rows(
    db: sqlite3.Connection, first_key: bytes, token_ids: Tensor, chunk_tokens: int
) -> list[list[BlockRef]]:
    """Return the known chunks from the start of every row, as many as the shortest has."""
    rows: list[list[BlockRef]] = []
    for ids in token_ids:
        row: list[BlockRef] = []
        for key in chain_keys(first_key, ids, chunk_tokens):
            place = blocks.find_by_key(db, key)
            if place is None:
                break
            row.append(BlockRef(*place, key))
        rows.append(row)
    shortest = min(map(len, rows))
    return [row[:shortest] for row in rows]


def _touch_users(db: sqlite3.Connection, segments: Sequence[int]) -> None:
    """Count a reused prefix as a use of the sessions that wrote it."""
    for number in segments:
        db.execute(
            "UPDATE sessions SET used_at = ? WHERE id IN (SELECT m.session FROM blocks b "
            "JOIN session_blocks m ON m.block = b.id WHERE b.segment = ?)",
            (time.time(), number),
        )


def _find(db: sqlite3.Connection, root: Root, name: str) -> tuple[object, ...]:
    row: tuple[object, ...] | None = db.execute(
        "SELECT * FROM sessions WHERE name = ?", (name,)
    ).fetchone()
    if row is None:
        [count] = db.execute("SELECT count(*) FROM sessions").fetchone()
        raise SessionNotFound(f"{root.paths.root} has no session {name!r} among its {count}")
    check_session_row(row, name)
    expires_at = row[8]
    if isinstance(expires_at, float) and expires_at < time.time():
        raise SessionNotFound(f"session {name!r} expired {time.time() - expires_at:.0f} s ago")
    return row


def _refuse_damaged(db: sqlite3.Connection, identity: str, name: str) -> None:
    bad = db.execute(
        "SELECT count(*), min(m.number) FROM session_blocks m JOIN blocks b ON b.id = m.block "
        "WHERE m.session = ? AND b.is_bad <> 0",
        (identity,),
    ).fetchone()
    if bad[0]:
        raise CorruptChunk(
            f"session {name!r} is damaged: {bad[0]} of its chunks are in quarantine, the first is "
            f"number {bad[1]}; what lies before it can be reused with its token ids"
        )
