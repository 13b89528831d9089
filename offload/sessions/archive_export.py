"""Export a session: everything it needs, in one file that stands alone."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import zstandard
from torch import Tensor

from offload.errors import ConfigError
from offload.sessions.archive_check import check_description
from offload.sessions.archive_format import (
    END,
    MANIFEST,
    SESSION,
    TAR_BLOCK_BYTES,
    Manifest,
    distinct_blocks,
    member_header,
    record_names,
)
from offload.sessions.archive_source import RecordSource
from offload.sessions.keys import chain_keys, is_foreign, record_id
from offload.sessions.new_file import new_file
from offload.sessions.opening import open_session
from offload.sessions.root import Root
from offload.sessions.session_file import BlockRef, SessionFile
from offload.tiers.codec import LEVEL, gains, shuffle
from offload.tiers.record import RecordFormat, raw_record
from offload.tiers.record_header import pack_header
from offload.types import ChunkInfo


@dataclass(frozen=True, slots=True)
class ExportReport:
    """An archive that was written.

    Attributes
    ----------
    path : Path
    num_chunks : int
    num_shuffled : int
        Chunks whose byte planes compress better than they do.
    content_bytes, archive_bytes : int
        Before and after compression.
    seconds : float
    """

    path: Path
    num_chunks: int
    num_shuffled: int
    content_bytes: int
    archive_bytes: int
    seconds: float


def export_session(
    root: Root,
    name: str,
    path: Path,
    progress: Callable[[int, int], object],
    *,
    overwrite: bool = False,
) -> ExportReport:
    """Write a session, with every chunk that it needs, to a new file for the user only.

    It is not encrypted, whether the root is or not. The file appears when it is complete; what
    exports to that folder have left that were killed is
    removed. Every record is verified as it is read; one that is
    damaged goes into quarantine, and ends the export.

    Parameters
    ----------
    root : Root
    name : str
    path : Path
        Outside the root, whose quota it would escape.
    progress : callable
        Told chunks written, and chunks in all.
    overwrite : bool
        Replace a file that is there.

    Raises
    ------
    ConfigError
        There is no writing to ``path``, or it is taken.
    SessionNotFound
    CorruptChunk
    DiskFull, StorageError, TransferTimeout
    """
    started = time.perf_counter()
    _refuse_target(root, path, overwrite)
    file, held = open_session(root, name)
    try:
        source, shown = RecordSource(root, file, held), _for_others(root, file)
        session, keys = shown.pack(), [ref.key for ref in distinct_blocks(shown)]
        check_description(session, f"session {name!r}")
        sizes = (len(session), len(file.layers), source.num_blocks, source.fmt.payload_bytes)
        manifest = Manifest(*sizes)
        with new_file(path, sync=root.syncs) as out:
            archive = _Archive(out, manifest)
            archive.add(MANIFEST, manifest.pack())
            archive.add(SESSION, session)
            with closing(source.records()) as records:
                for number, (own, payload) in enumerate(records):
                    info = replace(own, chunk_id=record_id(keys[number % len(keys)]))
                    archive.add_record(source.fmt, number, info, payload)
                    progress(number + 1, manifest.num_records)
            archive.finish()
            archive_bytes = out.tell()
    finally:
        held.release()
    return ExportReport(
        path=path,
        num_chunks=manifest.num_records,
        num_shuffled=archive.num_shuffled,
        content_bytes=manifest.total_bytes,
        archive_bytes=archive_bytes,
        seconds=time.perf_counter() - started,
    )


class _Archive:
    """A tar on its way through a compressor."""

    def __init__(self, out: BinaryIO, manifest: Manifest) -> None:
        self.num_shuffled = 0
        self._planes = np.empty(manifest.payload_bytes, np.uint8)
        compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True)
        # No context manager: it would end the frame after an error too, and hide the error.
        self._writer = compressor.stream_writer(out, size=manifest.total_bytes, closefd=False)

    def add(self, name: str, content: bytes) -> None:
        """Write a member."""
        self._writer.write(member_header(name, len(content)))
        self._writer.write(content)
        self._pad(len(content))

    def add_record(self, fmt: RecordFormat, number: int, info: ChunkInfo, payload: Tensor) -> None:
        """Write a record, as planes if that is worth it."""
        values, size = payload.numpy(), fmt.layout.dtype.itemsize
        is_shuffled = gains(values, size)
        header = pack_header(fmt, raw_record(fmt, info, values.data))
        num_bytes = len(header) + fmt.payload_bytes
        self._writer.write(member_header(record_names(number)[is_shuffled], num_bytes))
        self._writer.write(header)
        if is_shuffled:
            shuffle(values, size, self._planes)
            for plane in self._planes.reshape(size, -1):
                self._writer.flush(zstandard.FLUSH_BLOCK)
                self._writer.write(plane.data)
            self._writer.flush(zstandard.FLUSH_BLOCK)
            self.num_shuffled += 1
        else:
            self._writer.write(values.data)
        self._pad(num_bytes)

    def finish(self) -> None:
        """Write the end of the tar and of the frame."""
        self._writer.write(END)
        self._writer.flush(zstandard.FLUSH_FRAME)

    def _pad(self, num_bytes: int) -> None:
        self._writer.write(bytes(-num_bytes % TAR_BLOCK_BYTES))


def _for_others(root: Root, file: SessionFile) -> SessionFile:
    """Return a session whose chunks have the keys that tokens have without a secret."""
    ids = file.token_ids
    if root.sealer is None or ids is None or any(is_foreign(ref.key) for ref in _refs(file)):
        return file
    size, namespace = file.layout.chunk_tokens, file.namespace.digest
    rows = tuple(
        tuple(
            replace(ref, key=key)
            for ref, key in zip(refs, chain_keys(namespace, ids[row], size), strict=False)
        )
        for row, refs in enumerate(file.rows)
    )
    return replace(file, rows=rows)


def _refs(file: SessionFile) -> Iterator[BlockRef]:
    return (ref for refs in file.rows for ref in refs)


def _refuse_target(root: Root, path: Path, overwrite: bool) -> None:
    try:
        folder = path.parent.resolve(strict=True)
        is_folder, is_taken = path.is_dir(), os.path.lexists(path)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from error
    if folder.is_relative_to(root.paths.root.resolve()):
        raise ConfigError(f"{path} lies in the session store, whose quota counts sessions only")
    if is_folder:
        raise ConfigError(f"cannot write {path}: it is a folder")
    if is_taken and not overwrite:
        raise ConfigError(f"{path} exists; overwrite replaces it")
