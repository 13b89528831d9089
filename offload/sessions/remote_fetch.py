"""Fetch a session from an object store into a local one, each chunk verified on the way."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor

from offload.errors import CorruptChunk
from offload.sessions.archive_check import unpack_foreign
from offload.sessions.archive_format import Manifest as Sizes
from offload.sessions.archive_format import distinct_blocks
from offload.sessions.remote_manifest import Manifest
from offload.sessions.remote_upload import block_format
from offload.sessions.root import Root
from offload.sessions.saving import Content, save
from offload.sessions.session_file import MAX_BYTES, TOKENS, SessionFile
from offload.tiers.remote_block import Frame, decode_frame, parse_header
from offload.tiers.remote_bucket import Bucket
from offload.tiers.transfer import FutureTransfer, Transfer

_LOG = logging.getLogger(__name__)
_INDEX, _INDEXES = "index.", "indexes"


@dataclass(frozen=True, slots=True)
class FetchReport:
    """A session that was fetched.

    Attributes
    ----------
    name : str
    epoch : int
        Of its owner.
    num_tokens : int
        Per row.
    num_blocks : int
    num_new_tokens : int
        Per row; the local store had the others already.
    read_bytes : int
        From the object store.
    written_bytes : int
        Of records; what the local store had already was neither read nor written.
    seconds : float
    notes : mapping
        Of who has published it.
    """

    name: str
    epoch: int
    num_tokens: int
    num_blocks: int
    num_new_tokens: int
    read_bytes: int
    written_bytes: int
    seconds: float
    notes: Mapping[str, Any]


def fetch_session(
    root: Root,
    bucket: Bucket,
    manifest: Manifest,
    progress: Callable[[int, int], object],
    *,
    num_threads: int,
    overwrite: bool,
    trusted: bool,
    check: Callable[[SessionFile, Mapping[str, Any]], object],
) -> FetchReport:
    """Save a published session locally; on an error the root is as before.

    Parameters
    ----------
    root : Root
    bucket : Bucket
    manifest : Manifest
        Of a session that can be opened.
    progress : callable
        Told chunks done and chunks in all.
    num_threads : int
        Requests under way at a time.
    overwrite : bool
        Replace a session of that name.
    trusted : bool
        Let its tokens find its chunks, and search by its indexes.
    check : callable
        Given its file and notes, before its chunks are read; raises an error if this session is not
        wanted.
    """
    started = time.monotonic()
    file = read_file(bucket, manifest)
    check(file, manifest.notes)
    with BlockReader(bucket, file, manifest.blocks, num_threads) as reader:
        saved = save(
            root,
            manifest.name,
            as_content(file, reader, trusted=trusted),
            expires_at=manifest.expires_at,
            is_pinned=False,
            progress=progress,
            may_replace=overwrite,
        )
        saved.held.release()
    record_bytes = root.format_of(file.layout, file.namespace.fingerprint).record_bytes
    num_new = saved.written_bytes // (record_bytes * len(file.layers))
    size, num_rows = file.layout.chunk_tokens, max(1, len(file.rows))
    tail = file.num_tokens - size * max(map(len, file.rows), default=0)
    return FetchReport(
        name=manifest.name,
        epoch=manifest.epoch,
        num_tokens=file.num_tokens,
        num_blocks=len(manifest.blocks),
        num_new_tokens=tail + num_new * size // num_rows,
        read_bytes=manifest.file_bytes + reader.read_bytes,
        written_bytes=saved.written_bytes,
        seconds=time.monotonic() - started,
        notes=manifest.notes,
    )


def read_file(bucket: Bucket, manifest: Manifest) -> SessionFile:
    """Return the file of a session, which agrees with its manifest.

    Raises
    ------
    CorruptChunk
        It is damaged, missing, or another's.
    """
    what = f"{bucket.url}/{manifest.file}"
    if manifest.file_bytes > MAX_BYTES:
        raise CorruptChunk(f"{what} has {manifest.file_bytes} bytes, at most {MAX_BYTES} are read")
    content = bucket.get_range(manifest.file, 0, manifest.file_bytes)
    sizes = (manifest.num_layers, len(manifest.blocks), manifest.chunk_bytes)
    file = unpack_foreign(content, Sizes(manifest.file_bytes, *sizes), what)
    if file.name != manifest.name or file.namespace.digest.hex() != manifest.namespace:
        raise CorruptChunk(
            f"{what} is that of session {file.name!r} in namespace {file.namespace.digest.hex()}"
        )
    return file


class BlockReader:
    """The chunks of a session, each read by its range of an object.

    Parameters
    ----------
    bucket : Bucket
    file : SessionFile
    names : sequence of str
        Of the objects, in the order of ``distinct_blocks``.
    num_threads : int
        Requests under way at a time.
    """

    def __init__(
        self, bucket: Bucket, file: SessionFile, names: Sequence[str], num_threads: int
    ) -> None:
        self.read_bytes = 0
        self._bucket = bucket
        self._fmt = block_format(file)
        self._names = names
        self._keys = [ref.key for ref in distinct_blocks(file)]
        self._frames: dict[int, tuple[Frame, ...]] = {}
        self._locks = [threading.Lock() for _ in names]
        self._count = threading.Lock()
        self._pool = ThreadPoolExecutor(num_threads, "offload-remote")

    def read(self, numbers: Sequence[int], out: Sequence[Tensor]) -> Transfer:
        """Begin to fill buffers with chunks.

        Parameters
        ----------
        numbers : sequence of int
            Layer times the number of blocks, and block.
        out : sequence of Tensor, uint8 [slot_bytes]
        """
        jobs: list[Future[None]] = [
            self._pool.submit(self._read_one, number, buffer)
            for number, buffer in zip(numbers, out, strict=True)
        ]
        what = f"read of {len(jobs)} chunks from {self._bucket.url}"
        return FutureTransfer(what, len(jobs) * self._fmt.chunk_bytes, jobs)

    def close(self) -> None:
        """Let the requests under way end, and drop the others."""
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _read_one(self, number: int, out: Tensor) -> None:
        layer, block = divmod(number, len(self._names))
        try:
            self._fetch(layer, block, out)
        except CorruptChunk as error:
            # Perhaps on the way only.
            _LOG.warning("%s; reading it again", error)
            with self._locks[block]:
                self._frames.pop(block, None)
            self._fetch(layer, block, out)

    def _fetch(self, layer: int, block: int, out: Tensor) -> None:
        frame = self._frames_of(block)[layer]
        content = self._get(block, frame.start, frame.num_bytes)
        what = f"{self._bucket.url}/{self._names[block]}, layer {layer}"
        decode_frame(frame, content, self._fmt, out.numpy()[: self._fmt.chunk_bytes], what)

    def _frames_of(self, block: int) -> tuple[Frame, ...]:
        with self._locks[block]:
            if block not in self._frames:
                header = self._get(block, 0, self._fmt.header_bytes)
                what = f"{self._bucket.url}/{self._names[block]}"
                self._frames[block] = parse_header(header, self._fmt, self._keys[block], what)
            return self._frames[block]

    def _get(self, block: int, start: int, num_bytes: int) -> bytes:
        content = self._bucket.get_range(self._names[block], start, num_bytes)
        with self._count:
            self.read_bytes += num_bytes
        return content


def as_content(file: SessionFile, reader: BlockReader, *, trusted: bool) -> Content:
    """Return a session to be saved locally; its chunks go by the numbers of ``BlockReader``.

    Parameters
    ----------
    file : SessionFile
    reader : BlockReader
    trusted : bool
        Let its tokens find its chunks, and search by its indexes.
    """
    blocks = distinct_blocks(file)
    stop = len(blocks) * len(file.layers)
    columns = {ref: tuple(range(i, stop, len(blocks))) for i, ref in enumerate(blocks)}
    kept = {
        name: tensor
        for name, tensor in file.tensors.items()
        if name != TOKENS and (trusted or not name.startswith(_INDEX))
    }
    return Content(
        namespace=file.namespace,
        layout=file.layout,
        layers=file.layers,
        num_tokens=file.num_tokens,
        rows=[[columns[ref] for ref in row] for row in file.rows],
        read=reader.read,
        token_ids=file.token_ids,
        tensors=kept,
        state={name: part for name, part in file.state.items() if trusted or name != _INDEXES},
        known={},
        is_foreign=not trusted,
    )
