"""What the catalog says of single sessions, and where the files of these disagree.

A damaged row must not hide the others, so each is read on its own.
"""

from collections.abc import Iterator
from itertools import zip_longest

from offload.errors import CorruptCatalog
from offload.sessions.paths import is_identity
from offload.sessions.root import Root
from offload.sessions.schema import check_row, check_session_row
from offload.sessions.session_file import SessionFile


def row_errors(root: Root) -> Iterator[str]:
    """Yield what is wrong with the rows of other tables that have checksums."""
    for table, query in (
        ("meta", "SELECT * FROM meta"),
        (
            "segments",
            "SELECT name, namespace, num_layers, num_positions, record_bytes, used_bytes, checksum "
            "FROM segments",
        ),
    ):
        for row in root.catalog.rows(query):
            try:
                check_row(table, row[:-1], row[-1])
            except CorruptCatalog as error:
                yield str(error)


def identities(root: Root) -> tuple[list[str], list[str]]:
    """Return the identities of all sessions, and what is there in place of one."""
    rows = root.catalog.rows("SELECT CAST(id AS BLOB) FROM sessions")
    found = [value.decode("ascii", "replace") for (value,) in rows]
    good = [value for value in found if is_identity(value)]
    return good, [value for value in found if not is_identity(value)]


def name_of(root: Root, identity: str) -> str:
    """Return what a session is called, or its identity if it is gone.

    Raises
    ------
    CorruptCatalog
        Its row is damaged, or found under another name.
    """
    rows = root.catalog.rows("SELECT * FROM sessions WHERE id = ?", identity)
    if not rows:
        return identity
    check_session_row(rows[0])
    root.find(rows[0][1])
    return str(rows[0][1])


def is_listed(root: Root, identity: str) -> bool:
    """Whether the catalog has a session, damaged or not."""
    return bool(root.catalog.rows("SELECT 1 FROM sessions WHERE id = ?", identity))


def difference(root: Root, file: SessionFile) -> str | None:
    """Say where the catalog and the file of a session disagree."""
    rows = root.catalog.rows(
        "SELECT s.name, b.position FROM session_blocks m JOIN blocks b ON b.id = m.block "
        "JOIN segments s ON s.id = b.segment WHERE m.session = ? ORDER BY m.number",
        file.identity,
    )
    expected = [(ref.segment, ref.position) for row in file.rows for ref in row]
    if rows == expected:
        return None
    pairs = enumerate(zip_longest(expected, rows))
    number, (want, got) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
    return f"chunk {number} lies at {want} by its file, at {got} by the catalog"
