"""What damage means: the sessions that a record belongs to, and those that cannot be opened."""

from offload.sessions.catalog import Catalog
from offload.sessions.checking import BadRecord


def affected_sessions(catalog: Catalog, record: BadRecord) -> list[str]:
    """Return the names of the sessions that contain a record.

    Raises
    ------
    CorruptCatalog
    """
    rows = catalog.rows(
        "SELECT DISTINCT s.name FROM segments g "
        "JOIN blocks b ON b.segment = g.id AND b.position = ?2 % g.num_positions "
        "JOIN session_blocks m ON m.block = b.id JOIN sessions s ON s.id = m.session "
        "WHERE g.name = ?1 ORDER BY s.name",
        record.path.stem,
        record.index,
    )
    return [str(name) for (name,) in rows]


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
