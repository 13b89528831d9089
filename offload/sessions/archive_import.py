"""Import a session from an archive that anybody may have made."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from errno import EDQUOT
from pathlib import Path

from offload.config import format_size
from offload.errors import ConfigError, DiskFull
from offload.machine import read_memory
from offload.sessions.archive_format import Manifest, distinct_blocks
from offload.sessions.archive_reader import ArchiveReader
from offload.sessions.archive_stream import MAX_WINDOW_BYTES, ArchiveStream
from offload.sessions.names import check_name
from offload.sessions.root import Root
from offload.sessions.saving import Content, save
from offload.sessions.session_file import MAX_BYTES, TOKENS, SessionFile
from offload.sessions.session_rows import refuse_taken

_SESSION_COPIES = 8
"""The session's file, its parts, its tensors and blocks, and the new file."""
_INDEX, _INDEXES = "index.", "indexes"
"""Of tensors and of the state: what somebody else made is not searched, but built again."""
_RECORD_COPIES = 4
_BYTES_PER_RECORD = 512
"""What is kept about a record while it is written."""


@dataclass(frozen=True, slots=True)
class ImportReport:
    """A session that was imported.

    Attributes
    ----------
    name : str
    num_tokens : int
        Per row.
    num_chunks : int
    written_bytes : int
        Of records; what the root had already was not written again.
    archive_bytes : int
    seconds : float
    """

    name: str
    num_tokens: int
    num_chunks: int
    written_bytes: int
    archive_bytes: int
    seconds: float


def import_session(
    root: Root,
    path: Path,
    name: str | None,
    progress: Callable[[int, int], object],
    *,
    overwrite: bool = False,
    trust_prefixes: bool = False,
) -> ImportReport:
    """Save the session of an archive; it is neither pinned nor does it expire.

    The archive is read twice. Only when all of it has been verified is anything reserved, evicted
    or written; the second time each record is verified again. Every digest being right says that
    the archive is as it was made, not that who made it told the truth about its tokens: so no
    prefix finds its chunks, nor those of sessions that go on with it, unless it is trusted.

    Parameters
    ----------
    root : Root
    path : Path
    name : str or None
        None: as it was called.
    progress : callable
        Told steps done and steps in all, two for each chunk.
    overwrite : bool
        Replace a session of that name.
    trust_prefixes : bool
        Let its tokens find its chunks, for every session of that namespace; chunks that the root
        has for the same tokens are not written again.

    Raises
    ------
    ConfigError
        The name is taken or impossible; the archive cannot be read, is of another version, or
        takes more memory than there is.
    CorruptChunk
        The archive is damaged, incomplete, or not one that ``export_session`` writes.
    DiskFull
        The quota or the device has no room for it.
    StorageError
    """
    started = time.perf_counter()
    if name is not None:
        _refuse_taken(root, name, overwrite)
    with ArchiveStream(path) as stream:
        reader = ArchiveReader(stream)
        manifest = reader.manifest
        _refuse_too_large(root, manifest, path)
        file = reader.read_session()
        if name is None:
            name = file.name
            _refuse_taken(root, name, overwrite)
        total = 2 * manifest.num_records
        reader.verify(lambda done: progress(done, total))
        reader.rewind()
        saved = save(
            root,
            name,
            _content(reader, file, is_foreign=not trust_prefixes),
            expires_at=None,
            is_pinned=False,
            progress=lambda done, missing: progress(total - missing + done, total),
            may_replace=overwrite,
        )
        saved.held.release()
        if not saved.written_bytes:
            progress(total, total)
    return ImportReport(
        name=name,
        num_tokens=file.num_tokens,
        num_chunks=manifest.num_records,
        written_bytes=saved.written_bytes,
        archive_bytes=stream.num_bytes,
        seconds=time.perf_counter() - started,
    )


def _content(reader: ArchiveReader, file: SessionFile, *, is_foreign: bool) -> Content:
    """Name the chunks by the numbers of their records."""
    blocks = distinct_blocks(file)
    stop = len(blocks) * len(file.layers)
    columns = {ref: tuple(range(i, stop, len(blocks))) for i, ref in enumerate(blocks)}
    return Content(
        namespace=file.namespace,
        layout=file.layout,
        layers=file.layers,
        num_tokens=file.num_tokens,
        rows=[[columns[ref] for ref in row] for row in file.rows],
        read=reader.read,
        token_ids=file.token_ids,
        tensors={
            name: tensor
            for name, tensor in file.tensors.items()
            if name != TOKENS and not name.startswith(_INDEX)
        },
        state={name: part for name, part in file.state.items() if name != _INDEXES},
        known={},
        is_foreign=is_foreign,
    )


def _refuse_taken(root: Root, name: str, overwrite: bool) -> None:
    check_name(name)
    if not overwrite:
        with root.catalog.transaction() as db:
            refuse_taken(db, name)


def _refuse_too_large(root: Root, manifest: Manifest, path: Path) -> None:
    """Judge an archive by what it claims; nothing reads more than that."""
    usage = root.ledger.usage()
    if manifest.total_bytes > usage.quota_bytes:
        raise DiskFull(
            EDQUOT,
            f"{path} says it holds {format_size(manifest.total_bytes)}, the quota of "
            f"{root.paths.root} is {format_size(usage.quota_bytes)}",
        )
    if manifest.session_bytes > MAX_BYTES:
        raise ConfigError(
            f"{path} says its session's file has {format_size(manifest.session_bytes)}; at most "
            f"{format_size(MAX_BYTES)} are read"
        )
    needed = MAX_WINDOW_BYTES + _SESSION_COPIES * manifest.session_bytes
    needed += _RECORD_COPIES * manifest.record_bytes + _BYTES_PER_RECORD * manifest.num_records
    available = read_memory().available_bytes
    if needed > available:
        raise ConfigError(
            f"{path} takes up to {format_size(needed)} of memory to read, {format_size(available)} "
            "are available"
        )
