"""Archives of sessions as an attacker would make them; every checksum is right."""

import io
import json
import struct
import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import xxhash
import zstandard
from safetensors.torch import load
from safetensors.torch import save as save_tensors
from torch import Tensor

from offload.errors import OffloadError
from offload.sessions.archive_format import parse_manifest
from offload.sessions.saving import Content
from offload.sessions.store import SessionStore
from offload.types import PAGE_BYTES, ChunkLayout
from tests.support.sessions import make_content, make_token_ids, save, small_store, state_of

TINY = ChunkLayout(1, 4, 4, 4, torch.bfloat16)
"""Archives of a few kilobytes, so that every byte of them can be tried."""

Member = tuple[tarfile.TarInfo, bytes]
Part = bytes | tuple[int, int]
"""Bytes, or so many times one byte."""

_SESSION_HEADER = struct.Struct("<8sHxxIQQQ")
_BLOCK_BYTES = 128 << 10


def tiny_content() -> Content:
    """Return two rows of two chunks, in three layers."""
    return make_content(2, 1, 2, make_token_ids(2, 3, 2, TINY), layout=TINY)


def export_tiny(folder: Path) -> Path:
    """Export ``tiny_content`` as session ``chat``; return the archive, of 14 members."""
    path = folder / "good.kv.tar.zst"
    with small_store(folder / "source") as source:
        save(source, "chat", tiny_content())
        source.export("chat", path)
    return path


@contextmanager
def occupied_store(folder: Path) -> Iterator[SessionStore]:
    """Open a store that holds a session, and is clean in the end."""
    with small_store(folder / "root") as store:
        save(store, "old", make_content(2, 7, layout=TINY))
        yield store
        assert store.fsck().is_clean


@contextmanager
def unchanged(store: SessionStore) -> Iterator[None]:
    before = state_of(store)
    yield
    assert state_of(store) == before


def refuse(
    store: SessionStore, path: Path, kind: type[OffloadError], message: str | None = None
) -> None:
    """Expect that an archive is refused, and that nothing is left of the attempt."""
    with unchanged(store), pytest.raises(kind, match=message):
        store.import_(path, "new")


def decompress(path: Path) -> bytes:
    with path.open("rb") as file:
        return zstandard.ZstdDecompressor().stream_reader(file).read()


def compress(content: bytes, **options: Any) -> bytes:
    return zstandard.ZstdCompressor(level=1, **options).compress(content)


def members_of(path: Path) -> list[Member]:
    found: list[Member] = []
    with tarfile.open(fileobj=io.BytesIO(decompress(path)), mode="r:") as tar:
        for member in tar:
            opened = tar.extractfile(member)
            assert opened is not None
            found.append((member, opened.read()))
    return found


def tar_of(members: Sequence[Member], form: Literal[0, 1, 2] = tarfile.USTAR_FORMAT) -> bytes:
    """Return a tar that has whatever the members say, in their order."""
    parts = []
    for member, content in members:
        parts += [member.tobuf(form), content, bytes(-len(content) % tarfile.BLOCKSIZE)]
    return b"".join(parts) + bytes(2 * tarfile.BLOCKSIZE)


def forge(
    path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], object], **manifest: int
) -> bytes:
    """Return an archive whose session's file says something else.

    Parameters
    ----------
    path : Path
        An archive as it was exported.
    change : callable
        Changes the description and the tensors of the session's file.
    manifest
        What the manifest says instead.
    """
    members = members_of(path)
    [(first, page), (second, session)] = members[:2]
    session = _changed(session, change)
    sizes = replace(parse_manifest(page, str(path)), session_bytes=len(session), **manifest)
    second.size = len(session)
    return compress(tar_of([(first, sizes.pack()), (second, session), *members[2:]]))


def frame(parts: Sequence[Part], window_log: int = 17) -> bytes:
    """Write a zstd frame by hand, without content size and checksum (RFC 8878)."""
    blocks: list[tuple[int, int, bytes]] = []
    for part in parts:
        if isinstance(part, bytes):
            cut = [part[i : i + _BLOCK_BYTES] for i in range(0, len(part), _BLOCK_BYTES)]
            blocks += [(0, len(piece), piece) for piece in cut]
        else:
            byte, count = part
            assert count % _BLOCK_BYTES == 0
            blocks += [(1, _BLOCK_BYTES, bytes([byte]))] * (count // _BLOCK_BYTES)
    start = zstandard.FRAME_HEADER + bytes([0, window_log - 10 << 3])
    heads = [
        ((size << 3 | kind << 1 | (number == len(blocks) - 1)).to_bytes(3, "little"), content)
        for number, (kind, size, content) in enumerate(blocks)
    ]
    return start + b"".join(head + content for head, content in heads)


def _changed(
    session: bytes, change: Callable[[dict[str, Any], dict[str, Tensor]], object]
) -> bytes:
    magic, version, text_bytes, *_ = _SESSION_HEADER.unpack_from(session)
    body = PAGE_BYTES + text_bytes
    description, tensors = json.loads(session[PAGE_BYTES:body]), load(session[body:])
    change(description, tensors)
    parts = json.dumps(description).encode(), save_tensors(tensors)
    digests = map(xxhash.xxh3_64_intdigest, parts)
    page = bytearray(PAGE_BYTES)
    _SESSION_HEADER.pack_into(page, 0, magic, version, *map(len, parts), *digests)
    page[-8:] = xxhash.xxh3_64_intdigest(page[:-8]).to_bytes(8, "little")
    return bytes(page) + b"".join(parts)
