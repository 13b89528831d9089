"""Archives whose members, frames and sizes are not what an export writes."""

import os
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import zstandard

from offload.errors import ConfigError, CorruptChunk, DiskFull
from offload.machine import Memory
from offload.peak_memory import PeakMemory
from offload.sessions import archive_import
from offload.sessions.archive_format import Manifest, member_header
from offload.sessions.store import SessionStore
from offload.types import PAGE_BYTES
from tests.support.archives import (
    TINY,
    compress,
    decompress,
    frame,
    members_of,
    refuse,
    tar_of,
    tiny_content,
)
from tests.support.sessions import (
    expected_payloads,
    read_back,
    small_store,
)


def renamed(name: str) -> Callable[[tarfile.TarInfo], tarfile.TarInfo]:
    return lambda member: member.replace(name=name, deep=False)


def of_type(kind: bytes, **fields: Any) -> Callable[[tarfile.TarInfo], tarfile.TarInfo]:
    def change(member: tarfile.TarInfo) -> tarfile.TarInfo:
        member.type = kind
        for name, value in fields.items():
            setattr(member, name, value)
        return member

    return change


HOSTILE_MEMBERS = {
    "up": renamed("../x"),
    "up from inside": renamed("records/../../x"),
    "absolute": renamed("/tmp/x"),
    "dot": renamed("./records/00000001.planes"),
    "other number": renamed("records/00000002.planes"),
    "other suffix": renamed("records/00000001.pickle"),
    "symlink": of_type(tarfile.SYMTYPE, linkname="/etc/passwd"),
    "link": of_type(tarfile.LNKTYPE, linkname="manifest.json"),
    "character device": of_type(tarfile.CHRTYPE, devmajor=1, devminor=5),
    "block device": of_type(tarfile.BLKTYPE),
    "pipe": of_type(tarfile.FIFOTYPE),
    "folder": of_type(tarfile.DIRTYPE),
    "sparse": of_type(tarfile.GNUTYPE_SPARSE),
    "old type": of_type(tarfile.AREGTYPE),
    "set-uid": of_type(tarfile.REGTYPE, mode=0o4755),
    "owner": of_type(tarfile.REGTYPE, uid=1),
    "size": of_type(tarfile.REGTYPE, size=1 << 32),
}


@pytest.mark.parametrize("index", [0, 1, 3])
@pytest.mark.parametrize("what", HOSTILE_MEMBERS)
def test_member_that_is_not_the_expected_one_is_refused(
    what: str, index: int, store: SessionStore, path: Path, bad: Path
) -> None:
    members = members_of(path)
    member, content = members[index]
    members[index] = HOSTILE_MEMBERS[what](member), content
    bad.write_bytes(compress(tar_of(members)))
    refuse(store, bad, CorruptChunk, "should come next, not")


@pytest.mark.parametrize(
    "order",
    [
        pytest.param((1, 0, *range(2, 14)), id="session first"),
        pytest.param((0, 1, 3, 2, *range(4, 14)), id="records exchanged"),
        pytest.param((0, 1, 2, 2, *range(3, 14)), id="duplicate"),
        pytest.param((0, 0, *range(1, 14)), id="two manifests"),
        pytest.param((0, *range(2, 14)), id="no session"),
        pytest.param(tuple(range(13)), id="one too few"),
        pytest.param((*range(14), 13), id="one too many"),
    ],
)
def test_members_in_another_order_are_refused(
    order: tuple[int, ...], store: SessionStore, path: Path, bad: Path
) -> None:
    members = members_of(path)
    assert len(members) == 14
    bad.write_bytes(compress(tar_of([members[i] for i in order])))
    refuse(store, bad, CorruptChunk, "should come next, not|after 12 records there is")


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_extended_headers_are_refused(
    form: Literal[1, 2], store: SessionStore, path: Path, bad: Path
) -> None:
    members = members_of(path)
    members[0][0].name = "manifest.json" + "x" * 200
    bad.write_bytes(compress(tar_of(members, form)))
    refuse(store, bad, CorruptChunk, "'manifest.json' of 4096 bytes .* should come next")


def test_records_under_each_others_names_are_refused(
    store: SessionStore, path: Path, bad: Path
) -> None:
    members = members_of(path)
    contents = [content for _, content in members]
    contents[2], contents[3] = contents[3], contents[2]
    names = [member for member, _ in members]
    bad.write_bytes(compress(tar_of(list(zip(names, contents, strict=True)))))
    refuse(store, bad, CorruptChunk, "chunk_id|first_token")


def test_bytes_hidden_behind_a_member_are_refused(
    store: SessionStore, path: Path, bad: Path
) -> None:
    content = bytearray(decompress(path))
    padding = content.rindex(b"records/00000001") - 1
    assert content[padding] == 0
    content[padding] = 1
    bad.write_bytes(compress(bytes(content)))
    refuse(store, bad, CorruptChunk, "hidden behind records/00000000")


@pytest.mark.parametrize(
    "tail", [b"\0", b"garbage", compress(b""), compress(b"x"), b"\x50\x2a\x4d\x18\0\0\0\0"]
)
def test_anything_behind_the_frame_is_refused(
    tail: bytes, store: SessionStore, path: Path, bad: Path
) -> None:
    bad.write_bytes(path.read_bytes() + tail)
    refuse(store, bad, CorruptChunk, f"goes on after its frame of {path.stat().st_size} bytes")


@pytest.mark.parametrize("extra", [b"\0", bytes(512), b"x" * 100_000])
def test_anything_behind_the_tar_is_refused(
    extra: bytes, store: SessionStore, path: Path, bad: Path
) -> None:
    content = decompress(path)
    bad.write_bytes(compress(content + extra))
    refuse(store, bad, CorruptChunk, f"the content goes on after {len(content)} bytes")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no zstd file"),
        (b"PK\3\4" + bytes(100), "no zstd file: it starts with b'PK"),
        (zstandard.FRAME_HEADER, "bad.kv.tar.zst: "),
        (b"\x50\x2a\x4d\x18\x04\0\0\0skip", "no zstd file"),
        (compress(b""), "the content ends after 0 bytes"),
        (frame([bytes(10)])[:-13] + b"\x07\0\0", "a block of type 3"),
    ],
)
def test_what_is_no_archive_is_refused(
    content: bytes, message: str, store: SessionStore, bad: Path
) -> None:
    bad.write_bytes(content)
    refuse(store, bad, CorruptChunk, message)


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device"])
def test_what_is_no_file_is_refused_without_waiting(
    kind: str, store: SessionStore, tmp_path: Path
) -> None:
    path = tmp_path / kind
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path = Path("/dev/zero")
    refuse(store, path, ConfigError, "cannot read|is not a regular file")


BOMB_BYTES = 32 << 30


def claiming(**sizes: int) -> bytes:
    """Return the start of an archive: a manifest that claims something."""
    manifest = replace(Manifest(5000, 3, 4, TINY.chunk_bytes), **sizes)
    return member_header("manifest.json", PAGE_BYTES) + manifest.pack()


@pytest.mark.parametrize(
    ("sizes", "claim"),
    [
        ({"payload_bytes": 1 << 40}, "12 TiB"),
        ({"num_blocks": 1 << 30}, "15 TiB"),
        ({"session_bytes": 100 << 30}, "100 GiB"),
    ],
)
def test_small_archive_that_claims_terabytes_is_refused_at_once(
    sizes: dict[str, int], claim: str, store: SessionStore, bad: Path
) -> None:
    bad.write_bytes(compress(claiming(**sizes)))
    assert bad.stat().st_size < 1024
    with PeakMemory() as memory:
        refuse(store, bad, DiskFull, f"holds {claim}, the quota of .* is 64 MiB")
    assert memory.growth_bytes < 16 << 20


def test_claim_that_the_quota_allows_and_memory_does_not_is_refused(
    store: SessionStore, bad: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive_import, "read_memory", lambda: Memory(1 << 30, 64 << 20, None))
    bad.write_bytes(compress(claiming(session_bytes=32 << 20)))
    refuse(store, bad, ConfigError, "takes up to 264 MiB of memory to read, 64 MiB are")


def test_session_file_of_more_than_any_has_is_refused(tmp_path: Path, bad: Path) -> None:
    bad.write_bytes(compress(claiming(session_bytes=5 << 30)))
    with small_store(tmp_path / "root", quota="1TiB") as store:
        refuse(store, bad, ConfigError, "has 5 GiB; at most 4 GiB are read")


@pytest.mark.parametrize(
    ("num_members", "message"),
    [
        (0, "'manifest.json' of 4096 bytes .* should come next"),
        (1, "'session.kvsession' of .* should come next"),
        (2, "'records/00000000.raw' of .* should come next"),
        (14, "the content goes on after"),
    ],
)
def test_archive_that_expands_to_far_more_than_it_claims_is_read_no_further(
    num_members: int, message: str, store: SessionStore, path: Path, bad: Path
) -> None:
    good = tar_of(members_of(path)[:num_members])
    if num_members < 14:
        good = good[:-1024]
    bad.write_bytes(frame([good, (0, BOMB_BYTES)]))
    assert bad.stat().st_size < 1200 << 10
    with PeakMemory() as memory:
        refuse(store, bad, CorruptChunk, message)
    assert memory.growth_bytes < 16 << 20


def test_archive_written_by_hand_is_accepted(store: SessionStore, path: Path, bad: Path) -> None:
    bad.write_bytes(frame([decompress(path)]))
    store.import_(bad, "new")
    expected = expected_payloads(tiny_content())
    assert read_back(store, "new") == expected


def test_frame_that_takes_much_memory_to_decompress_is_refused(
    store: SessionStore, path: Path, bad: Path
) -> None:
    bad.write_bytes(frame([decompress(path)], window_log=24))
    refuse(
        store, bad, CorruptChunk, "takes 16777216 bytes of memory to decompress, at most 8388608"
    )
