"""Sessions that follow from a few numbers, so that any process knows what another has saved."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offload.sessions.keys import record_id
from offload.sessions.ledger import OVERHEAD_BYTES
from offload.sessions.opening import Held
from offload.sessions.paths import allocated_bytes
from offload.sessions.saving import Content
from offload.sessions.session_file import SessionFile
from offload.sessions.store import SessionStore
from offload.tiers.disk import DiskTier
from offload.tiers.record import RecordFormat
from offload.types import ChunkInfo, ChunkLayout
from tests.support.sessions import (
    WAIT_S,
    expected_payloads,
    make_content,
    make_session_namespace,
    make_token_ids,
)

LAYOUT = ChunkLayout(2, 8, 2, 2, torch.float32)
LAYERS = (0, 3)
BLOCK_BYTES = len(LAYERS) * RecordFormat(LAYOUT).record_bytes
FILE_BYTES = 8192
"""What the session file of a small recipe takes up."""

_NAMESPACE = make_session_namespace(LAYOUT, LAYERS)


@dataclass(frozen=True)
class Recipe:
    """What is in a session.

    Attributes
    ----------
    seed : int
        Of everything that is not shared.
    num_chunks : int
        Per row.
    family : int
        Recipes of one family begin with the same tokens, as many as ``shared_chunks`` hold.
    shared_chunks : int
    num_rows : int
    has_tokens : bool
    """

    seed: int
    num_chunks: int = 3
    family: int = 0
    shared_chunks: int = 0
    num_rows: int = 1
    has_tokens: bool = True

    @cached_property
    def token_ids(self) -> Tensor:
        """Token ids, int64 [num_rows, num_tokens]."""
        ids = make_token_ids(self.num_chunks, self.seed, self.num_rows, LAYOUT)
        num_shared = min(self.shared_chunks, self.num_chunks) * LAYOUT.chunk_tokens
        rng = np.random.default_rng([self.family, 1])
        ids[:, :num_shared] = torch.from_numpy(rng.integers(0, 50_000, 1000)[:num_shared])
        return ids

    @cached_property
    def content(self) -> Content:
        """The same as something to save."""
        ids = self.token_ids if self.has_tokens else None
        rows, layers = self.num_rows, LAYERS
        return make_content(
            self.num_chunks, self.seed, rows, ids, layout=LAYOUT, layers=layers, noise=True
        )

    @cached_property
    def payloads(self) -> list[bytes]:
        """Bytes of every chunk: rows, then positions, then layers."""
        return expected_payloads(self.content)

    @property
    def num_bytes(self) -> int:
        """The most that a session of this recipe takes up."""
        return self.num_chunks * self.num_rows * BLOCK_BYTES + FILE_BYTES


def quota_for(num_bytes: int) -> int:
    """Return a quota that leaves so many bytes for sessions."""
    return OVERHEAD_BYTES + num_bytes


def save(store: SessionStore, name: str, recipe: Recipe, **arguments: Any) -> None:
    """Save a recipe and let go of it."""
    store.save(name, recipe.content, **arguments).held.release()


class Reader:
    """Reads what a store holds the way caches do: the records are adopted by a disk tier.

    Parameters
    ----------
    directory : Path
        For the tier, outside of the root.
    """

    def __init__(self, directory: Path) -> None:
        self._tier = DiskTier(directory, capacity_bytes=0, layout=LAYOUT, num_threads=1)

    def payloads(self, held: Held) -> list[bytes]:
        """Return the bytes of every chunk: rows, then positions, then layers.

        Raises
        ------
        CorruptChunk, StorageError
        """
        slots, infos = [], []
        for row in held.rows:
            for position, ref in enumerate(row):
                for number, layer in enumerate(LAYERS):
                    path, index = held.place(ref, number)
                    slots += self._tier.adopt(path, held.fingerprint, [index])
                    token = position * LAYOUT.chunk_tokens
                    infos.append(ChunkInfo(record_id(ref.key), layer, token))
        out = torch.empty(len(slots), LAYOUT.slot_bytes, dtype=torch.uint8)
        self._tier.read(slots, infos, list(out)).wait(WAIT_S)
        return [buffer[: LAYOUT.chunk_bytes].numpy().tobytes() for buffer in out]

    def check(self, store: SessionStore, name: str, recipe: Recipe) -> None:
        """Open a session and compare every byte with its recipe.

        Raises
        ------
        AssertionError
            Something is not what was saved.
        OffloadError
            It cannot be had.
        """
        file, held = store.open(name)
        try:
            assert same_file(file, recipe), name
            assert self.payloads(held) == recipe.payloads, name
        finally:
            held.release()

    def check_prefix(self, store: SessionStore, recipe: Recipe) -> int:
        """Look for the tokens of a recipe, compare what is found, and return chunks per row."""
        found = store.find_prefix(
            _NAMESPACE.model_digest,
            LAYOUT.chunk_tokens,
            recipe.token_ids,
            lambda layout: make_session_namespace(layout, LAYERS).digest,
            LAYERS,
        )
        if found is None:
            return 0
        _, held = found
        try:
            each, num_found = recipe.num_chunks * len(LAYERS), len(held.rows[0])
            starts = range(0, each * recipe.num_rows, each)
            rows = [recipe.payloads[i : i + num_found * len(LAYERS)] for i in starts]
            assert self.payloads(held) == [payload for row in rows for payload in row]
            return num_found
        finally:
            held.release()

    def close(self) -> None:
        self._tier.close()


@contextmanager
def reading(directory: Path) -> Iterator[Reader]:
    """Make a reader, and close it."""
    reader = Reader(directory)
    try:
        yield reader
    finally:
        reader.close()


def same_file(file: SessionFile, recipe: Recipe) -> bool:
    """Whether everything of a session but its chunks follows from a recipe."""
    content = recipe.content
    expected = dict(content.tensors)
    if content.token_ids is not None:
        expected["token_ids"] = content.token_ids
    return (
        file.num_tokens == content.num_tokens
        and len(file.rows) == recipe.num_rows
        and file.layers == LAYERS
        and dict(file.state) == dict(content.state)
        and file.tensors.keys() == expected.keys()
        and all(torch.equal(file.tensors[key], value) for key, value in expected.items())
    )


def physical_bytes(root: Path) -> int:
    """Return what all below a root takes up, folders included; what goes meanwhile counts 0."""
    total = 0
    for folder, _, names in os.walk(root):
        for path in [folder, *(os.path.join(folder, name) for name in names)]:
            try:
                total += os.lstat(path).st_blocks * 512
            except FileNotFoundError:
                continue
    return total


def data_bytes(root: Path) -> int:
    """Return what segments and session files take up, which the overhead is not for."""
    files = [path for name in ("segments", "sessions") for path in (root / name).glob("*/*")]
    return sum(map(allocated_bytes, files))


def assert_clean(store: SessionStore) -> None:
    """Everything is verified, accounted for and within the quota, and nothing is left behind.

    Nothing of the store is lent, and nobody else has it open.
    """
    report = store.fsck()
    assert report.is_clean, report
    assert report.accounted_bytes == report.physical_bytes
    root = store._root
    assert root.paths.owner_locks() == [root.paths.owner(root.owner)]
    for table, expected in (
        ("owners", 1),
        ("leases", 0),
        ("reservations", 0),
        ("garbage_blocks", 0),
        ("garbage_sessions", 0),
    ):
        assert root.catalog.rows(f"SELECT count(*) FROM {table}") == [(expected,)], table
    usage = store.usage()
    assert max(usage.used_bytes, physical_bytes(store.path)) <= usage.quota_bytes
    leftovers = [*store.path.rglob(".*"), *store.path.rglob("*.tmp"), *store.path.rglob("*.new*")]
    assert leftovers == []
