"""Blocks in the catalog: found by what they contain, or by where they lie."""

import sqlite3
from collections.abc import Iterable, Sequence

from offload.errors import CorruptCatalog
from offload.sessions.schema import check_row, checksum, integer
from offload.sessions.session_file import BlockRef


def find_by_key(db: sqlite3.Connection, key: bytes) -> tuple[str, int] | None:
    """Return segment name and position of a good block with this key, or None."""
    row = db.execute(
        "SELECT s.name, b.position FROM blocks b JOIN segments s ON s.id = b.segment "
        "WHERE b.key = ? AND b.is_bad = 0",
        (key,),
    ).fetchone()
    return None if row is None else (str(row[0]), integer(row[1]))


def find_by_place(db: sqlite3.Connection, ref: BlockRef) -> int | None:
    """Return the row id of a block, or None if the catalog has forgotten it or knows it is bad."""
    row = db.execute(
        "SELECT b.id FROM segments s JOIN blocks b ON b.segment = s.id "
        "WHERE s.name = ? AND b.position = ? AND b.is_bad = 0",
        (ref.segment, ref.position),
    ).fetchone()
    return None if row is None else integer(row[0])


def is_kept(db: sqlite3.Connection, ref: BlockRef) -> bool:
    """Whether a block is in the catalog, or in the garbage, from where ``revive`` takes it back."""
    if find_by_place(db, ref) is not None:
        return True
    query = (
        "SELECT 1 FROM segments s JOIN garbage_blocks g ON g.segment = s.id "
        "WHERE s.name = ? AND g.position = ?"
    )
    return db.execute(query, (ref.segment, ref.position)).fetchone() is not None


def revive(db: sqlite3.Connection, ref: BlockRef) -> int | None:
    """Take a block back that was forgotten, whose file somebody's lease has kept.

    Returns
    -------
    int or None
        Its row id; None if it is not in the garbage.
    """
    row = db.execute(
        "SELECT s.id FROM segments s JOIN garbage_blocks g ON g.segment = s.id "
        "WHERE s.name = ? AND g.position = ?",
        (ref.segment, ref.position),
    ).fetchone()
    if row is None:
        return None
    db.execute(
        "DELETE FROM garbage_blocks WHERE segment = ? AND position = ?", (row[0], ref.position)
    )
    return add_block(db, integer(row[0]), ref.position, ref.key)


def add_block(db: sqlite3.Connection, segment: int, position: int, key: bytes | None) -> int:
    """Add a block and return its row id. A key that another block has is left to that one."""
    taken = db.execute("SELECT 1 FROM blocks WHERE key = ?", (key,)).fetchone() is not None
    cursor = db.execute(
        "INSERT INTO blocks (key, segment, position) VALUES (?, ?, ?)",
        (None if taken else key, segment, position),
    )
    return integer(cursor.lastrowid)


def add_segment(
    db: sqlite3.Connection, name: str, namespace: bytes, shape: tuple[int, int], record_bytes: int
) -> int:
    """Add a full segment and return its row id.

    Parameters
    ----------
    shape : tuple of int
        ``(num_layers, num_positions)``.
    """
    values = (name, namespace, *shape, record_bytes, shape[0] * shape[1] * record_bytes)
    cursor = db.execute(
        "INSERT INTO segments (name, namespace, num_layers, num_positions, record_bytes, "
        "used_bytes, checksum) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (*values, checksum(*values)),
    )
    return integer(cursor.lastrowid)


def segment_shape(db: sqlite3.Connection, name: str) -> tuple[int, int, int]:
    """Return row id, number of layers and number of positions of a segment."""
    row = db.execute("SELECT * FROM segments WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise CorruptCatalog(f"the catalog has no segment {name}; try `offload fsck --rebuild`")
    check_row("segments", row[1:-1], row[-1])
    if row[1] != name:
        raise CorruptCatalog(f"the catalog has segment {row[1]!r} under the name {name!r}")
    return integer(row[0]), integer(row[3]), integer(row[4])


def segment_ids(db: sqlite3.Connection, names: Iterable[str]) -> dict[str, int]:
    """Return the row id of each segment."""
    return {name: segment_shape(db, name)[0] for name in names}


def link_blocks(db: sqlite3.Connection, session: str, blocks: Sequence[int]) -> None:
    """Note the blocks of a session, row after row."""
    db.executemany(
        "INSERT INTO session_blocks VALUES (?, ?, ?)",
        [(session, number, block) for number, block in enumerate(blocks)],
    )
