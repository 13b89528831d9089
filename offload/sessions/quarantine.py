"""What is found damaged is set aside, so that nobody finds it again under its name."""

import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from offload.sessions import blocks
from offload.sessions.catalog import Catalog
from offload.sessions.checking import BadRecord
from offload.sessions.paths import RootPaths

_LOG = logging.getLogger(__name__)
_RECORD = re.compile(r"([0-9a-f]{32})-(\d+)\.kvrecord")


def quarantine_records(catalog: Catalog, paths: RootPaths, bad: Iterable[BadRecord]) -> None:
    """Copy damaged records aside, and make the catalog refuse them.

    No key finds such a block any more, so a prefix ends before it; sessions that contain it cannot
    be opened. The copy is for whoever wants to know what happened; it is no part of the quota.
    """
    for record in bad:
        _LOG.warning("quarantined: %s", record.reason)
        segment = record.path.stem
        with catalog.transaction() as db:
            number, _, num_positions = blocks.segment_shape(db, segment)
            [size] = db.execute(
                "SELECT record_bytes FROM segments WHERE id = ?", (number,)
            ).fetchone()
            db.execute(
                "UPDATE blocks SET is_bad = 1, key = NULL WHERE segment = ? AND position = ?",
                (number, record.index % num_positions),
            )
        _copy(record, int(size), paths.quarantine / f"{segment}-{record.index}.kvrecord")


def quarantine_file(paths: RootPaths, path: Path) -> None:
    """Move a damaged file aside, if it is still there."""
    try:
        os.replace(path, paths.quarantine / path.name)
    except FileNotFoundError:
        return
    except OSError as error:
        _LOG.warning("cannot move %s to quarantine: %s", path, error)


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
