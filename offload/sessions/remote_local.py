"""The local side: a root folder, and the blocks of a session in it, read and verified."""

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from offload.errors import ConfigError
from offload.sessions.archive_format import distinct_blocks
from offload.sessions.keys import record_id
from offload.sessions.opening import Held, open_session
from offload.sessions.root import Root
from offload.sessions.session_file import BlockRef, SessionFile
from offload.sessions.store import SessionStore
from offload.tiers.disk import DiskTier
from offload.tiers.pool import page_aligned
from offload.tiers.scratch import ScratchDir
from offload.types import ChunkInfo

_THREADS = 4


class BlockSource:
    """The blocks of an open session, in the order of ``distinct_blocks``. One thread.

    Parameters
    ----------
    file : SessionFile
    held : Held
    disk : DiskTier
        Which reads the records; of the session's layout.
    deadline_s : float
        Longest wait for one block.
    """

    def __init__(self, file: SessionFile, held: Held, disk: DiskTier, deadline_s: float) -> None:
        self.blocks: Sequence[tuple[BlockRef, int]] = list(distinct_blocks(file).items())
        self._file = file
        self._held = held
        self._disk = disk
        self._deadline_s = deadline_s

    def read(self, number: int) -> list[NDArray[np.uint8]]:
        """Return the chunks of a block, one per layer, uint8 [chunk_bytes] each.

        Raises
        ------
        CorruptChunk
            A record is not what was written.
        StorageError, TransferTimeout
        """
        ref, position = self.blocks[number]
        layout, layers = self._file.layout, self._file.layers
        places = [self._held.place(ref, layer) for layer in range(len(layers))]
        infos = [
            ChunkInfo(record_id(ref.key), layer, position * layout.chunk_tokens) for layer in layers
        ]
        slots = []
        try:
            for path, index in places:
                slots += self._disk.adopt(path, self._held.fingerprint, [index])
            memory = page_aligned(len(layers) * layout.slot_bytes).view(-1, layout.slot_bytes)
            self._disk.read(slots, infos, list(memory)).wait(self._deadline_s)
        finally:
            self._disk.free(slots)
        return [chunk[: layout.chunk_bytes].numpy() for chunk in memory]


@contextmanager
def open_root(store: SessionStore | str | Path) -> Iterator[Root]:
    """Open the root folder of a store, beside those who have it open."""
    if isinstance(store, SessionStore) and store.is_encrypted:
        raise ConfigError(
            f"{store.path} is encrypted, what is published would not be: export the session, and "
            "import it to a store without a key, if it is meant for others"
        )
    path = store.path if isinstance(store, SessionStore) else Path(store)
    with closing(Root(path)) as root:
        yield root


@contextmanager
def open_source(root: Root, name: str) -> Iterator[tuple[SessionFile, BlockSource]]:
    """Hold a session and read its blocks, for as long as the body runs.

    Raises
    ------
    SessionNotFound, CorruptChunk
    """
    file, held = open_session(root, name)
    try:
        with ScratchDir(root.paths.scratch) as scratch:
            disk = DiskTier(
                scratch.path,
                capacity_bytes=0,
                layout=file.layout,
                num_threads=_THREADS,
                deadline_s=root.deadline_s,
            )
            with closing(disk):
                yield file, BlockSource(file, held, disk, root.deadline_s)
    finally:
        held.release()
