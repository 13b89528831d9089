"""What is found damaged is set aside, so that nobody finds it again under its name."""

import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from offload.sessions.catalog import Catalog
from offload.sessions.checking import BadRecord
from offload.sessions.ledger import Ledger
from offload.sessions.paths import RootPaths, allocated_bytes
from offload.sessions.schema import integer
from offload.tiers.syscalls import as_storage_error

_LOG = logging.getLogger(__name__)
_MAX_BYTES = 64 << 20
"""What is in quarantine counts in the quota, and nothing evicts it."""
_RECORD = re.compile(r"([0-9a-f]{32})-(\d+)\.kvrecord")


def quarantine_records(catalog: Catalog, paths: RootPaths, bad: Iterable[BadRecord]) -> None:
    """Copy damaged records aside, and make the catalog refuse them.

    No key finds such a block any more, so a prefix ends before it; sessions that contain it cannot
    be opened. The copy is for whoever wants to know what happened, while the quota has room for it.
    """
    ledger = Ledger(catalog, paths, owner="")
    for record in bad:
        segment = record.path.stem
        with catalog.transaction() as db:
            row = db.execute(
                "SELECT id, num_positions, record_bytes FROM segments WHERE name = ?", (segment,)
            ).fetchone()
            if row is None:
                continue  # deleted meanwhile
            number, num_positions, size = map(integer, row)
            db.execute(
                "UPDATE blocks SET is_bad = 1, key = NULL WHERE segment = ? AND position = ?",
                (number, record.index % num_positions),
            )
        _LOG.warning("quarantined: %s", record.reason)
        has_room = size <= _room(paths.quarantine) and ledger.has_room_aside(size)
        name = f"{segment}-{record.index}.kvrecord"
        _copy(record, size if has_room else 0, paths.quarantine / name)


def quarantine_file(paths: RootPaths, path: Path) -> None:
    """Move a damaged file aside, if it is still there, or remove it if there is no room.

    Raises
    ------
    StorageError
        It is still there.
    """
    try:
        if allocated_bytes(path) > _room(paths.quarantine):
            path.unlink(missing_ok=True)
        else:
            os.replace(path, paths.quarantine / path.name)
    except FileNotFoundError:
        return
    except OSError as error:
        raise as_storage_error(error, f"cannot move {path} to quarantine") from error


def quarantined_records(paths: RootPaths) -> Iterator[tuple[str, int]]:
    """Yield segment name and index of every record in quarantine."""
    for entry in sorted(paths.quarantine.iterdir()):
        if found := _RECORD.fullmatch(entry.name):
            yield found[1], int(found[2])


def _copy(record: BadRecord, num_bytes: int, target: Path) -> None:
    try:
        with record.path.open("rb") as source:
            source.seek(record.index * num_bytes)
            content = source.read(num_bytes)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW
        with open(os.open(target, flags, 0o600), "wb") as file:
            file.write(content)
    except OSError as error:
        # The catalog refuses the record already; the copy is a convenience.
        _LOG.warning("no copy of %s record %d: %s", record.path, record.index, error)


def _room(folder: Path) -> int:
    return _MAX_BYTES - sum(map(allocated_bytes, folder.iterdir()))
