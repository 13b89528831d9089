"""What damage means: the sessions that a record belongs to, and what was known before."""

from offload.sessions.catalog import Catalog
from offload.sessions.checking import BadRecord

Place = tuple[str, int]
"""Segment, and position in it: one chunk of every layer, set aside together."""


def affected_sessions(catalog: Catalog, record: BadRecord) -> tuple[Place | None, list[str]]:
    """Return where a record lies, and the names of the sessions that contain it.

    Parameters
    ----------
    catalog : Catalog
    record : BadRecord

    Returns
    -------
    place : tuple of (str, int), or None
        None: the catalog has forgotten it.
    names : list of str

    Raises
    ------
    CorruptCatalog
    """
    rows = catalog.rows(
        "SELECT DISTINCT b.position, s.name FROM segments g "
        "JOIN blocks b ON b.segment = g.id AND b.position = ?2 % g.num_positions "
        "JOIN session_blocks m ON m.block = b.id JOIN sessions s ON s.id = m.session "
        "WHERE g.name = ?1 ORDER BY s.name",
        record.path.stem,
        record.index,
    )
    place = (record.path.stem, int(rows[0][0])) if rows else None
    return place, [str(name) for _, name in rows]


def quarantined_places(catalog: Catalog) -> set[Place]:
    """Return the places of all chunks that were set aside.

    Raises
    ------
    CorruptCatalog
    """
    rows = catalog.rows(
        "SELECT g.name, b.position FROM blocks b JOIN segments g ON g.id = b.segment "
        "WHERE b.is_bad <> 0"
    )
    return {(str(name), int(position)) for name, position in rows}


def damaged_sessions(catalog: Catalog) -> list[str]:
    """Return the names of the sessions that cannot be opened, because a chunk was set aside.

    Raises
    ------
    CorruptCatalog
    """
    rows = catalog.rows(
        "SELECT DISTINCT s.name FROM blocks b JOIN session_blocks m ON m.block = b.id "
        "JOIN sessions s ON s.id = m.session WHERE b.is_bad <> 0 ORDER BY s.name"
    )
    return [str(name) for (name,) in rows]
