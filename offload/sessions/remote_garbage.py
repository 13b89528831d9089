"""Remove from an object store what no manifest names, without ever racing those who publish.

Mark and sweep in two steps that are a grace period apart. What no manifest names, and is older than
that, is first put on a list of the condemned. Whoever publishes reads the lists first, treats what
they name as gone, and gives up after half a grace period. So when a list is a grace period old,
every publisher who did not see it has named what it uses, or never will: what is still named by no
manifest is removed. A list stays for long after, so that its names are not used again meanwhile.

Ages are by the clock of the store, in both steps. What is assumed: no request is under way for
longer than half a grace period.
"""

import json
import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from offload.errors import CorruptChunk, StorageError
from offload.sessions.remote_log import ManifestLog, is_manifest
from offload.sessions.remote_manifest import BLOCKS, CONDEMNED, SESSIONS, Manifest
from offload.tiers.remote_bucket import Bucket, Found

_SWEPT_UNTIL, _FORGOTTEN_AT = 9, 10
"""Ages of a list, in grace periods: when nothing is removed by it any more, and when it is."""
_BATCH = 500


@dataclass(slots=True)
class GarbageReport:
    """What a collection has found and done.

    Attributes
    ----------
    num_sessions : int
        That can be opened.
    num_condemned : int
        Objects newly put on the list.
    num_removed, removed_bytes : int
        Objects, and what they had.
    seconds : float
    """

    num_sessions: int = 0
    num_condemned: int = 0
    num_removed: int = 0
    removed_bytes: int = 0
    seconds: float = 0.0


@dataclass(slots=True)
class _Marks:
    names: set[str] = field(default_factory=set)
    old_versions: list[Found] = field(default_factory=list)


def read_condemned(bucket: Bucket) -> frozenset[str]:
    """Return the names of all objects that are about to go, or may be gone.

    Raises
    ------
    CorruptChunk
        A list is damaged.
    """
    names: set[str] = set()
    for found in _lists(bucket):
        names |= _read_list(bucket, found)
    return frozenset(names)


def collect(
    bucket: Bucket, log: ManifestLog, grace_s: float, clock: Callable[[], float]
) -> GarbageReport:
    """Do one round: remove what was condemned a grace period ago, and condemn what is unnamed now.

    Parameters
    ----------
    bucket : Bucket
    log : ManifestLog
    grace_s : float
        The same for everybody who uses the store.
    clock : callable
        Seconds since 1970, by which sessions expire.

    Raises
    ------
    CorruptChunk
        A manifest or list is damaged: nothing is removed as long as it is not known what is needed.
    StorageError
    """
    started, report = time.monotonic(), GarbageReport()
    now_s = _store_time(bucket)
    stored = {found.name: found for found in bucket.list(BLOCKS)}
    stored |= {each.name: each for each in bucket.list(SESSIONS) if not is_manifest(each)}
    lists = [(found, _read_list(bucket, found)) for found in _lists(bucket)]
    marks = _mark(log, now_s - grace_s, clock(), report)
    doomed: set[str] = set()
    for found, names in lists:
        if grace_s <= now_s - found.modified_at < _SWEPT_UNTIL * grace_s:
            doomed |= names
    unnamed = {name: found for name, found in stored.items() if name not in marks.names}
    dead = [found for name, found in unnamed.items() if name in doomed]
    _remove(bucket, [*dead, *marks.old_versions], report, started + grace_s / 2)
    known = frozenset().union(*(names for _, names in lists))
    fresh = [
        name
        for name, found in unnamed.items()
        if name not in known and now_s - found.modified_at >= grace_s
    ]
    if fresh:
        content = json.dumps(sorted(fresh)).encode()
        bucket.create(f"{CONDEMNED}/{secrets.token_hex(16)}.json", content)
    report.num_condemned = len(fresh)
    over = [
        found.name for found, _ in lists if now_s - found.modified_at >= _FORGOTTEN_AT * grace_s
    ]
    bucket.delete(over)
    report.seconds = time.monotonic() - started
    return report


def _mark(log: ManifestLog, young_s: float, now_s: float, report: GarbageReport) -> _Marks:
    """Find what is needed: what a session names, or did so a moment ago."""
    marks = _Marks()
    for versions in log.all().values():
        newest = log.read(versions[-1])
        is_live = newest.is_live(now_s)
        report.num_sessions += is_live
        if is_live or versions[-1].modified_at > young_s or newest.lease_until > now_s:
            _add(marks, newest)
        else:
            marks.old_versions.append(versions[-1])
        for found in versions[:-1]:
            if found.modified_at > young_s:
                _add(marks, log.read(found))
            else:
                marks.old_versions.append(found)
    return marks


def _add(marks: _Marks, manifest: Manifest) -> None:
    marks.names.update(manifest.blocks)
    marks.names.add(manifest.file)


def _remove(bucket: Bucket, dead: Iterable[Found], report: GarbageReport, until_s: float) -> None:
    dead = list(dead)
    for start in range(0, len(dead), _BATCH):
        if time.monotonic() > until_s:
            return  # what was read may not hold any more; the next round goes on
        part = dead[start : start + _BATCH]
        bucket.delete([found.name for found in part])
        report.num_removed += len(part)
        report.removed_bytes += sum(found.num_bytes for found in part)


def _lists(bucket: Bucket) -> list[Found]:
    return [found for found in bucket.list(CONDEMNED) if found.name.endswith(".json")]


def _read_list(bucket: Bucket, found: Found) -> frozenset[str]:
    try:
        names = json.loads(bucket.get(found.name))
    except ValueError as error:
        raise CorruptChunk(f"{bucket.url}/{found.name} is no list of names: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CorruptChunk(f"{bucket.url}/{found.name} is no list of names")
    return frozenset(names)


def _store_time(bucket: Bucket) -> float:
    """Return the time by the clock of the store."""
    name = f"{CONDEMNED}/{secrets.token_hex(16)}.probe"
    bucket.create(name, b"?")
    found = bucket.find(name)
    bucket.delete([name])
    if found is None:
        raise StorageError(f"{bucket.url}/{name} was written, and is not there")
    return found.modified_at
