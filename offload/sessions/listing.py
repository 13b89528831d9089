"""What the catalog says about sessions."""

import time
from dataclasses import dataclass

from offload.sessions.catalog import Catalog
from offload.sessions.schema import check_session_row


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One session.

    Attributes
    ----------
    name : str
    num_tokens : int
        Per row.
    num_rows : int
    num_chunks : int
        Full chunks, of all layers.
    num_bytes : int
        Of its chunks and its own file, shared or not.
    own_bytes : int
        What no other session needs.
    created_at, used_at : float
        Seconds since 1970.
    expires_at : float or None
    is_pinned, is_open, is_damaged : bool
        Never evicted; some cache holds it; a chunk is in quarantine.
    """

    name: str
    num_tokens: int
    num_rows: int
    num_chunks: int
    num_bytes: int
    own_bytes: int
    created_at: float
    used_at: float
    expires_at: float | None
    is_pinned: bool
    is_open: bool
    is_damaged: bool


_QUERY = """
SELECT s.*,
  coalesce((SELECT sum(g.num_layers * g.record_bytes) FROM
    (SELECT DISTINCT block FROM session_blocks WHERE session = s.id) m
    JOIN blocks b ON b.id = m.block JOIN segments g ON g.id = b.segment), 0),
  coalesce((SELECT sum(g.num_layers * g.record_bytes) FROM
    (SELECT DISTINCT block FROM session_blocks WHERE session = s.id) m
    JOIN blocks b ON b.id = m.block JOIN segments g ON g.id = b.segment
    WHERE NOT EXISTS (SELECT 1 FROM session_blocks o
                      WHERE o.block = m.block AND o.session <> s.id)), 0),
  EXISTS (SELECT 1 FROM leases WHERE session = s.id),
  EXISTS (SELECT 1 FROM session_blocks m JOIN blocks b ON b.id = m.block
          WHERE m.session = s.id AND b.is_bad <> 0)
FROM sessions s WHERE (?1 IS NULL OR s.name = ?1)
  AND coalesce(s.expires_at, ?2 + 1) > ?2 ORDER BY s.name
"""
_NUM_COLUMNS = 12


def list_sessions(catalog: Catalog, name: str | None = None) -> list[SessionInfo]:
    """Return all sessions that have not expired, or the one with a name, by name."""
    return [_info(row) for row in catalog.rows(_QUERY, name, time.time())]


def _info(row: tuple[object, ...]) -> SessionInfo:
    session, (num_bytes, own_bytes, is_open, is_damaged) = row[:_NUM_COLUMNS], row[_NUM_COLUMNS:]
    check_session_row(session)
    _, name, _, tokens, rows, chunks, file_bytes, created, expires, pinned, used, _ = session
    return SessionInfo(
        name=str(name),
        num_tokens=_int(tokens),
        num_rows=_int(rows),
        num_chunks=_int(chunks),
        num_bytes=_int(num_bytes) + _int(file_bytes),
        own_bytes=_int(own_bytes) + _int(file_bytes),
        created_at=_float(created),
        used_at=_float(used),
        expires_at=None if expires is None else _float(expires),
        is_pinned=bool(pinned),
        is_open=bool(is_open),
        is_damaged=bool(is_damaged),
    )


def _int(value: object) -> int:
    return value if isinstance(value, int) else 0


def _float(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
