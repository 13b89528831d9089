"""Check an encrypted root without its key: that its files are as they were written, bit for bit.

What they hold, whether it is all there and who needs it only ``fsck`` with the key can tell.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from offload.errors import CorruptChunk, StorageError
from offload.sessions.checking import is_damage
from offload.sessions.paths import RootPaths, is_temporary
from offload.sessions.session_file import read_content
from offload.sessions.session_seal import check_blob
from offload.tiers.record_header import check_structure
from offload.tiers.syscalls import as_storage_error
from offload.types import PAGE_BYTES

_HOLE = bytes(PAGE_BYTES)


@dataclass(slots=True)
class StructureReport:
    """What was found.

    Attributes
    ----------
    num_sessions, num_records, num_bytes : int
        That were compared with their checksums.
    bad : dict of str to str
        File, and record, to what is wrong with it.
    seconds : float
    """

    num_sessions: int = 0
    num_records: int = 0
    num_bytes: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


def check_files(root: Path, progress: Callable[[int, int], object]) -> StructureReport:
    """Compare every record and session file below a root with its checksums; change nothing.

    Others may go on using the root; what they remove meanwhile is passed over.

    Parameters
    ----------
    root : Path
    progress : callable
        Told files read, and how many there are.

    Raises
    ------
    StorageError
        It cannot be told.
    """
    started, report = time.perf_counter(), StructureReport()
    files = [path for path in RootPaths(root).data_files() if not is_temporary(path)]
    for number, path in enumerate(files, 1):
        try:
            if path.suffix == ".kvseg":
                _check_segment(path, report)
            else:
                content = read_content(path)
                report.num_sessions += 1
                report.num_bytes += len(content)
                check_blob(content, path)
        except StorageError as error:
            if not is_damage(error):
                raise
            if path.exists():
                report.bad[path.name] = str(error)
        progress(number, len(files))
    report.seconds = time.perf_counter() - started
    return report


def _check_segment(path: Path, report: StructureReport) -> None:
    """Check one record after the other; behind a damaged header, look for the next page of one."""
    offset, is_lost = 0, False
    try:
        with path.open("rb") as file:
            while page := file.read(PAGE_BYTES):
                what = f"{path.name} at byte {offset}"
                try:
                    if page != _HOLE:  # of a record that was deleted
                        num_bytes = check_structure(page, file.read, what)
                        report.num_records += 1
                        report.num_bytes += num_bytes
                        offset += num_bytes - PAGE_BYTES
                        is_lost = False
                except CorruptChunk as error:
                    if not is_lost:
                        report.bad[what] = str(error)
                    is_lost = True
                    file.seek(offset + PAGE_BYTES)
                offset += PAGE_BYTES
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise as_storage_error(error, f"read of {path}") from error
