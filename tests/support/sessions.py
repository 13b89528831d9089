"""Small session stores, and sessions whose every byte is known beforehand.

What a chunk holds follows from its tokens, as it does in a model: the same beginning gives the same
keys and values. Without tokens it follows from the seed, the row and the position.
"""

import hashlib
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from offload.sessions.keys import chain_keys, record_id
from offload.sessions.namespace import Namespace, make_namespace
from offload.sessions.saving import Column, Content
from offload.sessions.store import SessionStore
from offload.tiers.disk import DiskTier
from offload.tiers.pool import page_aligned
from offload.tiers.transfer import CompletedTransfer, Transfer
from offload.types import ChunkInfo, ChunkLayout

LAYOUT = ChunkLayout(2, 16, 32, 32, torch.float32)
"""Records of three pages."""

LAYERS = (0, 1, 2)
TAIL_TOKENS = 5
"""Behind the full chunks; less if a chunk is shorter."""

WAIT_S = 30.0


def small_store(path: Path, **kwargs: object) -> SessionStore:
    """Open a store of 64 MiB; keyword arguments as for ``SessionStore``."""
    return SessionStore(path, **{"quota": "64MiB", "min_free": 0, **kwargs})  # type: ignore[arg-type]


def make_session_namespace(
    layout: ChunkLayout = LAYOUT, layers: Sequence[int] = LAYERS, salt: str = ""
) -> Namespace:
    """Return the namespace of all the contents made here."""
    model = {"config": "c", "rotary": "r", "weights": "w", "dtype": "float32"}
    return make_namespace(model, layout, list(layers), salt)


def make_token_ids(
    num_chunks: int, seed: int, rows: int = 1, layout: ChunkLayout = LAYOUT
) -> Tensor:
    """Return random tokens for full chunks and a tail, int64 [rows, num_tokens]."""
    rng = np.random.default_rng(seed)
    num_tokens = num_chunks * layout.chunk_tokens + TAIL_TOKENS % layout.chunk_tokens
    return torch.from_numpy(rng.integers(0, 50_000, (rows, num_tokens)))


def make_content(
    num_chunks: int,
    seed: int,
    rows: int = 1,
    token_ids: Tensor | None = None,
    *,
    layout: ChunkLayout = LAYOUT,
    layers: Sequence[int] = LAYERS,
    noise: bool = False,
) -> Content:
    """Return a session to save.

    Parameters
    ----------
    num_chunks : int
        Full chunks of every row; a tail of ``TAIL_TOKENS`` follows.
    seed : int
    rows : int
    token_ids : Tensor, optional
        At least ``num_tokens`` for each row; ``make_token_ids`` has some.
    noise : bool
        Payloads that nothing can compress, instead of normally distributed numbers.
    """
    namespace = make_session_namespace(layout, layers)
    num_tokens = num_chunks * layout.chunk_tokens + TAIL_TOKENS % layout.chunk_tokens
    if token_ids is not None:
        token_ids = token_ids[:, :num_tokens]
    origins: dict[int, bytes] = {}
    columns: list[list[Column]] = []
    for row in range(rows):
        keys = [f"{seed}/{row}/{position}".encode() for position in range(num_chunks)]
        if token_ids is not None:
            keys = chain_keys(namespace.digest, token_ids[row], layout.chunk_tokens)
        columns.append([])
        for key in keys:
            names = [_chunk_name(key, layer) for layer in layers]
            origins |= {
                name: key + bytes([layer]) for name, layer in zip(names, layers, strict=True)
            }
            columns[-1].append(tuple(names))

    def read(chunks: Sequence[int], out: Sequence[Tensor]) -> Transfer:
        for chunk, buffer in zip(chunks, out, strict=True):
            payload = make_payload(origins[chunk], layout, noise=noise)
            buffer[: layout.chunk_bytes] = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
        return CompletedTransfer(len(chunks) * layout.chunk_bytes)

    shape = (rows, layout.num_kv_heads, num_tokens % layout.chunk_tokens, layout.row_dim)
    tail = torch.arange(math.prod(shape)).remainder(7 + seed).float().view(shape)
    return Content(
        namespace=namespace,
        layout=layout,
        layers=tuple(layers),
        num_tokens=num_tokens,
        rows=columns,
        read=read,
        token_ids=token_ids,
        tensors={f"tail.{layer}": (tail + layer).to(layout.dtype) for layer in layers},
        state={"seed": seed},
        known={},
    )


def make_payload(origin: bytes, layout: ChunkLayout, *, noise: bool = False) -> bytes:
    """Return the bytes of a chunk, ``layout.chunk_bytes`` of them."""
    seed = int.from_bytes(hashlib.blake2b(origin, digest_size=8).digest(), "little")
    rng = np.random.default_rng(seed)
    if noise:
        return rng.bytes(layout.chunk_bytes)
    values = torch.from_numpy(rng.standard_normal(layout.num_elements, dtype=np.float32))
    return values.to(layout.dtype).view(torch.uint8).numpy().tobytes()


def expected_payloads(content: Content) -> list[bytes]:
    """Return what ``read_back`` returns for a session that was saved from this."""
    chunks = [chunk for row in content.rows for column in row for chunk in column]
    out = torch.zeros(len(chunks), content.layout.slot_bytes, dtype=torch.uint8)
    content.read(chunks, list(out)).wait(WAIT_S)
    return [buffer[: content.layout.chunk_bytes].numpy().tobytes() for buffer in out]


def read_back(store: SessionStore, name: str) -> list[bytes]:
    """Read every record of a session as a cache does; rows, then positions, then layers.

    Raises
    ------
    CorruptChunk
        A record is not what was written.
    """
    file, held = store.open(name)
    layout = file.layout
    places, infos = [], []
    for row in file.rows:
        for position, ref in enumerate(row):
            for number, layer in enumerate(file.layers):
                places.append(held.place(ref, number))
                first_token = position * layout.chunk_tokens
                infos.append(ChunkInfo(record_id(ref.key), layer, first_token))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            tier = DiskTier(Path(scratch), capacity_bytes=0, layout=layout, num_threads=2)
            try:
                slots = [
                    tier.adopt(path, held.fingerprint, [i], held.sealer)[0] for path, i in places
                ]
                out = page_aligned(max(1, len(slots)) * layout.slot_bytes).view(
                    -1, layout.slot_bytes
                )
                tier.read(slots, infos, list(out)[: len(slots)]).wait(WAIT_S)
            finally:
                tier.close()
    finally:
        held.release()
    return [buffer[: layout.chunk_bytes].numpy().tobytes() for buffer in out[: len(slots)]]


def state_of(store: SessionStore) -> dict[str, object]:
    """Return what a failed operation must not change: files, sessions, leases, reservations."""
    rows = store._root.catalog.rows
    return {
        "files": {path: path.stat().st_mtime_ns for path in store._root.paths.data_files()},
        "sessions": rows("SELECT id, name, is_pinned FROM sessions ORDER BY id"),
        "leases": rows("SELECT * FROM leases ORDER BY lease, segment"),
        "reservations": rows("SELECT * FROM reservations ORDER BY id"),
        "garbage": rows("SELECT * FROM garbage_blocks"),
    }


def save(store: SessionStore, name: str, content: Content) -> int:
    """Save a session and let go of it; return the bytes of the records that were written."""
    saved = store.save(name, content)
    saved.held.release()
    return saved.written_bytes


def _chunk_name(key: bytes, layer: int) -> int:
    digest = hashlib.blake2b(key + bytes([layer]), digest_size=7).digest()
    return int.from_bytes(digest, "little")
