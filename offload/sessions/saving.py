"""Save a session: plan, reserve, write, publish. It is visible whole, or not at all."""

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from offload.errors import DiskFull, StorageError
from offload.sessions import blocks
from offload.sessions.garbage import forget_session, try_collect
from offload.sessions.keys import chain_keys, foreign_key, is_foreign, random_key, record_id
from offload.sessions.leases import add_lease, discard_unpublished, drop_lease
from offload.sessions.namespace import Namespace, layout_text
from offload.sessions.opening import Held
from offload.sessions.paths import make_shard, new_id, publish, temporary
from offload.sessions.root import Root
from offload.sessions.segment_writer import SegmentWriter
from offload.sessions.session_file import BlockRef, SessionFile, write_packed
from offload.sessions.session_rows import insert_row, refuse_taken
from offload.sessions.session_seal import seal_session
from offload.tiers.record import RecordFormat
from offload.tiers.transfer import Transfer
from offload.types import ChunkInfo, ChunkLayout, round_up

Column = tuple[int, ...]
"""The chunks of one position of one row, one per layer, by whatever names the caller has."""

_CATALOG_BLOCK_BYTES = 512
"""A block, its two indexes and its place in a session: about 200 bytes, and again in the log."""


@dataclass(frozen=True, slots=True)
class Content:
    """What is to be saved.

    Attributes
    ----------
    namespace : Namespace
    layout : ChunkLayout
    layers : tuple of int
        Offloaded model layers.
    num_tokens : int
        Per row.
    rows : sequence of sequence of Column
        Full chunks of each row.
    read : callable
        Begins to copy chunks, given by their names, into host buffers.
    token_ids : Tensor or None, int64 [num_rows, num_tokens]
        What was read to make the keys and values, all of it attended to, from position 0. With
        them, other sessions that begin alike share the chunks.
    tensors, state : mapping
        See ``SessionFile``.
    known : mapping of Column to BlockRef
        Chunks that came from this store, or were saved to it before.
    is_foreign : bool
        A stranger says that these are the keys and values of the tokens: no prefix finds them. What
        is added to foreign chunks is foreign too.
    """

    namespace: Namespace
    layout: ChunkLayout
    layers: tuple[int, ...]
    num_tokens: int
    rows: Sequence[Sequence[Column]]
    read: Callable[[Sequence[int], Sequence[Tensor]], Transfer]
    token_ids: Tensor | None
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]
    known: Mapping[Column, BlockRef]
    is_foreign: bool = False


@dataclass(slots=True)
class _Plan:
    """Where every column goes."""

    refs: dict[Column, BlockRef]
    segment: str
    new: list[tuple[Column, int, bytes]] = field(default_factory=list)
    """Column, position in the sequence, key: in the order of the new segment."""
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    lease: str = ""


@dataclass(frozen=True, slots=True)
class Saved:
    """A session that was published.

    Attributes
    ----------
    file : SessionFile
    refs : dict of Column to BlockRef
    held : Held
        Keeps all its chunks in place for the cache that saved them.
    written_bytes : int
        Of records; what was there already is not written again.
    """

    file: SessionFile
    refs: dict[Column, BlockRef]
    held: Held
    written_bytes: int


def save(
    root: Root,
    name: str,
    content: Content,
    *,
    expires_at: float | None,
    is_pinned: bool,
    progress: Callable[[int, int], object],
    may_replace: bool = True,
) -> Saved:
    """Write what the store does not have yet, then publish the session under its name.

    A session of that name is replaced at the same instant. On an error nothing has changed but
    sessions that were evicted to make room.

    Parameters
    ----------
    root : Root
    name : str
    content : Content
    expires_at : float or None
    is_pinned : bool
    progress : callable
        Told chunks written and chunks to write.
    may_replace : bool
        Whether a session of that name may be replaced.

    Raises
    ------
    ConfigError
        The name is taken, and the session may not be replaced.
    DiskFull, StorageError, CorruptChunk, TransferTimeout
    """
    identity, plan = new_id(), _Plan({}, new_id())
    fmt = root.format_of(content.layout, content.namespace.fingerprint)
    with _undone_on_error(root, plan, identity):
        _fill_plan(plan, root, content)
        file = _session_file(identity, name, content, plan, expires_at, is_pinned)
        packed = seal_session(file.pack(), identity, root.sealer)
        num_bytes = len(plan.new) * len(content.layers) * fmt.record_bytes
        needed = num_bytes + round_up(len(packed)) + _catalog_bytes(content)
        root.ledger.reserve(needed, plan.segment, identity, root.find(name))
        if plan.new:
            _write_segment(root, plan, content, fmt, progress)
        path = root.paths.session(identity)
        file_bytes = write_packed(temporary(path), packed, sync=root.syncs)
        publish(path, durable=root.is_strict)
        with root.catalog.transaction() as db:
            if not may_replace:
                refuse_taken(db, name)
            _publish(db, file, plan, content, fmt.record_bytes, file_bytes)
            drop_lease(db, plan.lease)
            segments = blocks.segment_ids(db, file.segments).values()
            lease = add_lease(db, root.owner, identity, segments)
    try_collect(root.catalog, root.paths)
    held = Held(root, lease, file.rows, plan.shapes, content.namespace.fingerprint)
    return Saved(file, plan.refs, held, num_bytes)


def _fill_plan(plan: _Plan, root: Root, content: Content) -> None:
    """Find out what the store has already, and keep that in place."""
    is_tainted = _is_tainted(content)
    make_key = foreign_key if is_tainted else random_key
    by_key: dict[bytes, BlockRef] = {}
    with root.catalog.transaction() as db:
        for row, columns in enumerate(content.rows):
            keys = [] if is_tainted else _row_keys(root, content, row)
            for position, column in enumerate(columns):
                if column in plan.refs:
                    continue
                key = keys[position] if keys else make_key()
                ref = by_key.get(key) or _existing(db, content.known.get(column), key, bool(keys))
                if ref is None:
                    ref = BlockRef(plan.segment, len(plan.new), key)
                    plan.new.append((column, position, key))
                plan.refs[column] = by_key[key] = ref
        segments = []
        for name in {ref.segment for ref in plan.refs.values()} - {plan.segment}:
            number, *shape = blocks.segment_shape(db, name)
            segments.append(number)
            plan.shapes[name] = (shape[0], shape[1])
        plan.lease = add_lease(db, root.owner, None, segments)
    if plan.new:
        plan.shapes[plan.segment] = (len(content.layers), len(plan.new))


def _is_tainted(content: Content) -> bool:
    """Whether some of the chunks are a stranger's, and the others follow from them."""
    known = (content.known.get(column) for row in content.rows for column in row)
    return content.is_foreign or any(ref is not None and is_foreign(ref.key) for ref in known)


def _existing(
    db: sqlite3.Connection, known: BlockRef | None, key: bytes, is_found_by_key: bool
) -> BlockRef | None:
    # With tokens a chunk that was saved without is written again, under the key that finds it.
    is_same = known is not None and (known.key == key or not is_found_by_key)
    if known is not None and is_same and blocks.is_kept(db, known):
        return known
    place = blocks.find_by_key(db, key)
    return None if place is None else BlockRef(*place, key)


def _row_keys(root: Root, content: Content, row: int) -> list[bytes]:
    if content.token_ids is None:
        return []
    ids = content.token_ids[row]
    return chain_keys(root.first_key(content.namespace.digest), ids, content.layout.chunk_tokens)


def _session_file(
    identity: str,
    name: str,
    content: Content,
    plan: _Plan,
    expires_at: float | None,
    is_pinned: bool,
) -> SessionFile:
    rows = tuple(tuple(plan.refs[column] for column in row) for row in content.rows)
    tensors = dict(content.tensors)
    if content.token_ids is not None:
        tensors["token_ids"] = content.token_ids
    return SessionFile(
        identity=identity,
        name=name,
        namespace=content.namespace,
        layout=content.layout,
        layers=content.layers,
        num_tokens=content.num_tokens,
        rows=rows,
        segments=plan.shapes,
        tensors=tensors,
        state=content.state,
        created_at=time.time(),
        expires_at=expires_at,
        is_pinned=is_pinned,
    )


def _catalog_bytes(content: Content) -> int:
    """Return by how much the catalog and its log may grow."""
    return _CATALOG_BLOCK_BYTES * sum(len(row) for row in content.rows)


def _write_segment(
    root: Root,
    plan: _Plan,
    content: Content,
    fmt: RecordFormat,
    progress: Callable[[int, int], object],
) -> None:
    """Write the new columns, layer after layer, so that each layer is read in one go."""
    size = content.layout.chunk_tokens
    infos = [
        ChunkInfo(record_id(key), layer, position * size)
        for layer in content.layers
        for _, position, key in plan.new
    ]
    chunks = [column[i] for i in range(len(content.layers)) for column, _, _ in plan.new]
    done = 0

    def read(indexes: Sequence[int], out: Sequence[Tensor]) -> Transfer:
        return content.read([chunks[index] for index in indexes], out)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        progress(done, len(infos))

    path = root.paths.segment(plan.segment)
    make_shard(path)
    with SegmentWriter(path, fmt, infos, deadline_s=root.deadline_s) as writer:
        writer.fill(read, advance)
        if root.syncs:
            writer.sync()
    publish(path, durable=root.is_strict)


def _publish(
    db: sqlite3.Connection,
    file: SessionFile,
    plan: _Plan,
    content: Content,
    record_bytes: int,
    file_bytes: int,
) -> None:
    """Make the session visible, and the one it replaces invisible."""
    namespace = file.namespace
    db.execute(
        "INSERT OR IGNORE INTO namespaces VALUES (?, ?, ?)",
        (namespace.digest, namespace.model_digest, layout_text(file.layout)),
    )
    row_of: dict[BlockRef, int] = {}
    if plan.new:
        shape = plan.shapes[plan.segment]
        segment = blocks.add_segment(db, plan.segment, namespace.digest, shape, record_bytes)
        for _, _, key in plan.new:
            ref = BlockRef(plan.segment, len(row_of), key)
            lookup = key if content.token_ids is not None else None
            row_of[ref] = blocks.add_block(db, segment, ref.position, lookup)
    for ref in plan.refs.values():
        if ref not in row_of:
            row_of[ref] = _kept_block(db, ref)
    add_session(db, file, [row_of[ref] for row in file.rows for ref in row], file_bytes)
    db.execute("DELETE FROM reservations WHERE id = ?", (file.identity,))


def add_session(
    db: sqlite3.Connection, file: SessionFile, block_ids: Sequence[int], file_bytes: int
) -> None:
    """Add a session whose blocks are in the catalog; one of the same name is forgotten."""
    # First of all: what the new one shares with the old one must not become garbage.
    blocks.link_blocks(db, file.identity, block_ids)
    for (old,) in db.execute("SELECT id FROM sessions WHERE name = ?", (file.name,)).fetchall():
        forget_session(db, old)
    insert_row(db, file, file_bytes)


def _kept_block(db: sqlite3.Connection, ref: BlockRef) -> int:
    found = blocks.find_by_place(db, ref)
    if found is None:
        found = blocks.revive(db, ref)
    if found is None:
        raise StorageError(
            f"chunk {ref.position} of segment {ref.segment} was quarantined during the save; "
            "save again"
        )
    return found


@contextmanager
def _undone_on_error(root: Root, plan: _Plan, identity: str) -> Iterator[None]:
    """Leave no file, reservation or lease behind if the block fails."""
    try:
        yield
    except BaseException:
        try:
            _undo(root, plan, identity)
        except DiskFull:
            # The catalog had no room to forget either; now that the files are gone, it may.
            _undo(root, plan, identity)
        raise


def _undo(root: Root, plan: _Plan, identity: str) -> None:
    with root.catalog.transaction() as db:
        discard_unpublished(db, root.paths, plan.segment, identity)
        db.execute("DELETE FROM reservations WHERE id = ?", (identity,))
        drop_lease(db, plan.lease)
