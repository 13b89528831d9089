"""The file of one session: everything but the full chunks, which lie in segments.

A header page, then JSON, then tensors in the safetensors format, each with a checksum. The byte
offsets are in ``docs/file-format.md``. Nothing in it can run code.
"""

import json
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from offload.errors import ConfigError, CorruptChunk
from offload.sessions.keys import KEY_BYTES
from offload.sessions.names import check_name
from offload.sessions.namespace import Namespace, named_dtype
from offload.sessions.paths import make_shard
from offload.sessions.session_seal import MAGIC, VERSION, open_sealed, seal_session
from offload.tiers.record import RecordFormat
from offload.tiers.sealing import Sealer
from offload.tiers.syscalls import as_storage_error
from offload.types import PAGE_BYTES, ChunkLayout, round_up

MAX_BYTES = 4 << 30
"""No session file is larger: a header that says so is not believed."""

_MAX_ROWS = 1 << 16

_FIELDS = struct.Struct("<8sHxxIQQQ")  # magic, version, json bytes, tensor bytes, two checksums
_DIGEST = struct.Struct("<Q")
_BLOCK_DTYPE = np.dtype([("segment", "<u4"), ("position", "<u4"), ("key", f"V{KEY_BYTES}")])
_PARSE_ERRORS = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)
_BLOCKS, TOKENS = "blocks", "token_ids"


@dataclass(frozen=True, slots=True)
class BlockRef:
    """Where the chunks of one position of one row lie, for all layers.

    Attributes
    ----------
    segment : str
        Name of the segment.
    position : int
        Record ``layer_number * num_positions + position`` of the segment holds each layer's chunk.
    key : bytes
        ``KEY_BYTES``; their start is the chunk id of the records.
    """

    segment: str
    position: int
    key: bytes


@dataclass(frozen=True, slots=True)
class SessionFile:
    """What a session file says.

    Attributes
    ----------
    identity : str
        32 hex digits, also the name of the file.
    name : str
    namespace : Namespace
    layout : ChunkLayout
    layers : tuple of int
        Offloaded model layers, in the order of the records.
    num_tokens : int
        Per row, the tail included.
    rows : tuple of tuple of BlockRef
        Full chunks of each row of the batch, in order.
    segments : mapping of str to (num_layers, num_positions)
        Shape of every segment that the rows name.
    tensors : mapping of str to Tensor
        ``token_ids`` [num_rows, num_tokens] if known, tails, states of other layers.
    state : mapping
        JSON of the layers that are not offloaded.
    created_at : float
        Seconds since 1970.
    expires_at : float or None
    is_pinned : bool
    """

    identity: str
    name: str
    namespace: Namespace
    layout: ChunkLayout
    layers: tuple[int, ...]
    num_tokens: int
    rows: tuple[tuple[BlockRef, ...], ...]
    segments: Mapping[str, tuple[int, int]]
    tensors: Mapping[str, Tensor] = field(repr=False)
    state: Mapping[str, Any] = field(repr=False)
    created_at: float
    expires_at: float | None = None
    is_pinned: bool = False

    @property
    def token_ids(self) -> Tensor | None:
        """Token ids, int64 [num_rows, num_tokens]; None if nobody told them."""
        return self.tensors.get(TOKENS)

    @property
    def num_chunks(self) -> int:
        """Different full chunks, of all layers."""
        return len({ref for row in self.rows for ref in row}) * len(self.layers)

    def pack(self) -> bytes:
        """Return the bytes of the file."""
        names = list(self.segments)
        numbers = {name: i for i, name in enumerate(names)}
        table = np.array(
            [[(numbers[ref.segment], ref.position, ref.key) for ref in row] for row in self.rows],
            dtype=_BLOCK_DTYPE,
        )
        raw = torch.frombuffer(bytearray(table.tobytes() or b"\0"), dtype=torch.uint8)
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        body = save({**tensors, _BLOCKS: raw})
        text = json.dumps(self._as_json(names), sort_keys=True).encode()
        digests = xxhash.xxh3_64_intdigest(text), xxhash.xxh3_64_intdigest(body)
        page = bytearray(PAGE_BYTES)
        _FIELDS.pack_into(page, 0, MAGIC, VERSION, len(text), len(body), *digests)
        _DIGEST.pack_into(page, PAGE_BYTES - 8, xxhash.xxh3_64_intdigest(page[: PAGE_BYTES - 8]))
        return bytes(page) + text + body

    def _as_json(self, segments: Sequence[str]) -> dict[str, Any]:
        layout = self.layout
        return {
            "identity": self.identity,
            "name": self.name,
            "namespace": dict(self.namespace.fields),
            "layout": [layout.num_kv_heads, layout.chunk_tokens, layout.key_dim, layout.value_dim],
            "dtype": str(layout.dtype).removeprefix("torch."),
            "layers": list(self.layers),
            "num_tokens": self.num_tokens,
            "num_rows": len(self.rows),
            "segments": [[name, *self.segments[name]] for name in segments],
            "state": self.state,
            "created_at": self.created_at,
            "expires_at": self.expires_at,
            "is_pinned": self.is_pinned,
        }


def unpack(content: bytes, what: str) -> SessionFile:
    """Read the bytes of a session file.

    Parameters
    ----------
    content : bytes
    what : str
        Names the file in an error.

    Raises
    ------
    CorruptChunk
        They are not what was written.
    ConfigError
        A newer version of this package has written them.
    """
    sizes = _check_header(content[:PAGE_BYTES], what)
    if len(content) != PAGE_BYTES + sum(sizes[:2]):
        raise CorruptChunk(
            f"{what} has {len(content)} bytes, its header says {PAGE_BYTES + sum(sizes[:2])}"
        )
    text = content[PAGE_BYTES : PAGE_BYTES + sizes[0]]
    body = content[PAGE_BYTES + sizes[0] :]
    for part, digest, name in ((text, sizes[2], "description"), (body, sizes[3], "tensors")):
        found = xxhash.xxh3_64_intdigest(part)
        if found != digest:
            raise CorruptChunk(f"{what}: checksum of the {name} is {found:x}, stored {digest:x}")
    try:
        return _from_parts(json.loads(text), load(body))
    except (*_PARSE_ERRORS, SafetensorError) as error:
        raise CorruptChunk(f"{what}: not a session: {error!r}") from error


def read_session_file(path: Path, sealer: Sealer | None = None) -> SessionFile:
    """Read a session file from disk; see ``unpack`` and ``open_sealed``."""
    content = open_sealed(read_content(path), path, sealer)
    session = unpack(content, str(path))
    _check_tails(session, str(path))
    return session


def read_content(path: Path) -> bytes:
    """Return the bytes of a session file.

    Raises
    ------
    CorruptChunk
        It is missing, or too large to be one.
    StorageError
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise CorruptChunk(f"{path} has {size} bytes, at most {MAX_BYTES} are believed")
            return file.read()
    except FileNotFoundError as error:
        raise CorruptChunk(f"{path} is missing") from error
    except CorruptChunk:
        raise
    except OSError as error:
        raise as_storage_error(error, f"read of {path}") from error


def write_session_file(
    path: Path, session: SessionFile, sealer: Sealer | None = None, *, sync: bool
) -> int:
    """Write a new session file; see ``seal_session`` and ``write_packed``."""
    content = seal_session(session.pack(), session.identity, sealer)
    return write_packed(path, content, sync=sync)


def write_packed(path: Path, content: bytes, *, sync: bool) -> int:
    """Write what ``pack`` returned, for the owner only; return the bytes it takes up.

    Raises
    ------
    DiskFull, StorageError
        The file may be there in part.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    make_shard(path)
    try:
        with open(os.open(path, flags, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
    except OSError as error:
        raise as_storage_error(error, f"write of {len(content)} bytes to {path}") from error
    return round_up(len(content))


def renamed(session: SessionFile, **changes: Any) -> SessionFile:
    """Return a copy with other ``name``, ``expires_at``, ``is_pinned``."""
    return replace(session, **changes)


def _check_header(page: bytes, what: str) -> tuple[int, int, int, int]:
    if len(page) < PAGE_BYTES:
        raise CorruptChunk(f"{what} ends inside its header, after {len(page)} bytes")
    [stored] = _DIGEST.unpack_from(page, PAGE_BYTES - 8)
    found = xxhash.xxh3_64_intdigest(page[: PAGE_BYTES - 8])
    if found != stored:
        raise CorruptChunk(f"{what}: header checksum is {found:x}, stored {stored:x}")
    magic, version, json_bytes, tensor_bytes, *digests = _FIELDS.unpack_from(page)
    if magic == MAGIC and version > VERSION:
        raise ConfigError(
            f"{what} was written by a newer version of this package: version {version}, "
            f"this code reads {VERSION}"
        )
    if (magic, version) != (MAGIC, VERSION):
        raise CorruptChunk(f"{what}: {magic!r} version {version}; this code reads {VERSION}")
    return json_bytes, tensor_bytes, digests[0], digests[1]


def _from_parts(text: dict[str, Any], tensors: dict[str, Tensor]) -> SessionFile:
    raw = tensors.pop(_BLOCKS).numpy().tobytes()
    num_rows = int(text["num_rows"])
    heads, size, key_dim, value_dim = map(int, text["layout"])
    layout = ChunkLayout(heads, size, key_dim, value_dim, named_dtype(text["dtype"]))
    RecordFormat(layout)  # refuses what no record can hold
    num_blocks = int(text["num_tokens"]) // layout.chunk_tokens if num_rows else 0
    table = np.frombuffer(raw, _BLOCK_DTYPE, count=len(raw) // _BLOCK_DTYPE.itemsize)
    names = [name for name, *_ in text["segments"]]
    refs = [BlockRef(names[s], int(p), k.tobytes()) for s, p, k in table]
    per_row = len(refs) // num_rows if num_rows else 0
    if not 0 < num_rows <= _MAX_ROWS:
        raise ValueError(f"{num_rows} rows; at most {_MAX_ROWS}")
    if per_row > num_blocks or per_row * num_rows != len(refs):
        raise ValueError(f"{len(refs)} blocks in {num_rows} rows of {text['num_tokens']} tokens")
    return SessionFile(
        identity=text["identity"],
        name=check_name(text["name"]),
        namespace=Namespace(text["namespace"]),
        layout=layout,
        layers=tuple(map(int, text["layers"])),
        num_tokens=int(text["num_tokens"]),
        rows=tuple(tuple(refs[i * per_row : (i + 1) * per_row]) for i in range(num_rows)),
        segments={name: (int(layers), int(count)) for name, layers, count in text["segments"]},
        tensors=tensors,
        state=text["state"],
        created_at=float(text["created_at"]),
        expires_at=text["expires_at"],
        is_pinned=bool(text["is_pinned"]),
    )


def _check_tails(session: SessionFile, what: str) -> None:
    """Raise CorruptChunk unless every layer has the tail that its chunks leave."""
    layout = session.layout
    num_blocks = len(session.rows[0]) if session.rows else 0
    num_tail = session.num_tokens - num_blocks * layout.chunk_tokens
    expected = (len(session.rows), layout.num_kv_heads, num_tail, layout.row_dim)
    for layer in session.layers:
        tail = session.tensors.get(f"tail.{layer}")
        if tail is None or tuple(tail.shape) != expected or tail.dtype != layout.dtype:
            found = None if tail is None else (tail.dtype, list(tail.shape))
            raise CorruptChunk(f"{what}: tail of layer {layer} is {found}, not {list(expected)}")
