"""Upload the chunks of a session: what the store does not have, several at a time."""

import secrets
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from offload.sessions.remote_local import BlockSource
from offload.sessions.remote_manifest import block_name, folder_of
from offload.sessions.session_file import SessionFile
from offload.tiers.remote_block import BlockFormat, pack_block
from offload.tiers.remote_bucket import Bucket

_WINDOW = 2
"""Blocks waiting for each thread: one being uploaded, one ready."""


def block_format(file: SessionFile) -> BlockFormat:
    """Return the format of the objects with a session's chunks."""
    layout = file.layout
    return BlockFormat(
        file.namespace.fingerprint, len(file.layers), layout.chunk_bytes, layout.dtype.itemsize
    )


class Uploader:
    """Uploads the blocks of one session.

    Parameters
    ----------
    bucket : Bucket
    file : SessionFile
    condemned : frozenset of str
        Names of objects that may be removed at any time, and are as good as gone.
    named : iterable of str
        Blocks that are there, as the newest manifest of a session that is ours names them.
    num_threads : int
        Requests under way at a time.
    compress, rewrite : bool
        ``rewrite``: also what the store has already.
    """

    def __init__(
        self,
        bucket: Bucket,
        file: SessionFile,
        condemned: frozenset[str],
        named: Iterable[str],
        *,
        num_threads: int,
        compress: bool,
        rewrite: bool,
    ) -> None:
        self.written_blocks = self.written_bytes = 0
        self._bucket = bucket
        self._file = file
        self._fmt = block_format(file)
        self._condemned = condemned
        self._named = {_stem(name): name for name in named if name not in condemned}
        self._num_threads = num_threads
        self._compress = compress
        self._rewrite = rewrite
        # Of blocks whose own name is condemned: a name that nobody has heard of.
        self._generation = secrets.token_hex(8)

    def upload(
        self, source: BlockSource, progress: Callable[[int, int], object]
    ) -> tuple[str, ...]:
        """Upload what is missing; returns the names of all blocks, in the source's order."""
        names = [self._name(ref.key) for ref, _ in source.blocks]
        num_done, most = 0, _WINDOW * self._num_threads
        with ThreadPoolExecutor(self._num_threads, "offload-remote") as pool:
            is_there = list(pool.map(self._is_there, names))
            writes: deque[Future[int]] = deque()
            try:
                for number, (ref, _) in enumerate(source.blocks):
                    if not is_there[number]:
                        chunks = source.read(number)
                        writes.append(pool.submit(self._write, names[number], ref.key, chunks))
                    while writes and (len(writes) > most or writes[0].done()):
                        self._count(writes.popleft())
                    num_done += 1
                    progress(num_done, len(names))
                while writes:
                    self._count(writes.popleft())
            except BaseException:
                for write in writes:
                    write.cancel()
                raise
        return tuple(names)

    def upload_file(self) -> tuple[str, int]:
        """Upload the session's file; returns its name and size."""
        content = self._file.pack()
        name = f"{folder_of(self._file.name)}/{secrets.token_hex(16)}.kvsession"
        self._bucket.create(name, content)
        return name, len(content)

    def _name(self, key: bytes) -> str:
        name = block_name(self._file.namespace.digest, key)
        if (known := self._named.get(_stem(name))) is not None:
            return known
        if name not in self._condemned:
            return name
        return block_name(self._file.namespace.digest, key, self._generation)

    def _is_there(self, name: str) -> bool:
        if self._rewrite:
            return False
        return _stem(name) in self._named or self._bucket.find(name) is not None

    def _write(self, name: str, key: bytes, chunks: list[NDArray[np.uint8]]) -> int:
        content = pack_block(self._fmt, key, chunks, compress=self._compress)
        if self._rewrite:
            self._bucket.replace(name, content)
        else:
            # False: somebody who has computed the same was faster.
            self._bucket.create(name, content)
        return len(content)

    def _count(self, write: "Future[int]") -> None:
        self.written_bytes += write.result()
        self.written_blocks += 1


def _stem(name: str) -> str:
    """Return the name of a block without its generation."""
    return name.rpartition("-")[0]
