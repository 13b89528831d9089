"""Sessions that travel in a file: out of one root, into another, byte for byte."""

import io
import itertools
import os
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard

from offload import ConfigError, OffloadedCache, SessionNotFound, SessionStore
from offload.types import PAGE_BYTES, ChunkLayout
from tests.support.generation import generate, prompt
from tests.support.models import make_model, tight_capacity
from tests.support.sessions import (
    LAYERS,
    LAYOUT,
    TAIL_TOKENS,
    expected_payloads,
    make_content,
    make_session_namespace,
    make_token_ids,
    read_back,
    save,
    small_store,
    state_of,
)

pytestmark = pytest.mark.leaks

LAYOUTS = {
    "float32": LAYOUT,
    "bfloat16": ChunkLayout(3, 16, 24, 40, torch.bfloat16),
    "fp8": ChunkLayout(2, 16, 32, 32, torch.float8_e4m3fn),
    "odd": ChunkLayout(1, 3, 5, 2, torch.float16),
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SessionStore]:
    with small_store(tmp_path / "root") as opened:
        yield opened
        assert opened.fsck().is_clean


@pytest.fixture
def other(tmp_path: Path) -> Iterator[SessionStore]:
    with small_store(tmp_path / "other") as opened:
        yield opened
        assert opened.fsck().is_clean


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "chat.kv.tar.zst"


def content_of(path: Path) -> dict[str, bytes]:
    """Unpack an archive with the standard library, a decompressor, and nothing of ours."""
    with path.open("rb") as file:
        content = zstandard.ZstdDecompressor().stream_reader(file).read()
    found: dict[str, bytes] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            opened = tar.extractfile(member)
            assert opened is not None
            assert member.isreg()
            assert member.name not in found
            found[member.name] = opened.read()
    return found


@pytest.mark.parametrize("has_tokens", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_imported_session_has_the_bytes_of_the_exported(
    layout: str, rows: int, has_tokens: bool, store: SessionStore, other: SessionStore, path: Path
) -> None:
    chosen = LAYOUTS[layout]
    ids = make_token_ids(5, 3, rows, chosen) if has_tokens else None
    content = make_content(5, 1, rows, ids, layout=chosen)
    save(store, "chat", content)
    exported = store.export("chat", path)
    imported = other.import_(path)
    assert read_back(other, "chat") == expected_payloads(content)
    assert exported.num_chunks == imported.num_chunks == 5 * rows * len(LAYERS)
    assert exported.archive_bytes == imported.archive_bytes == path.stat().st_size
    before, after = store.describe("chat"), other.describe("chat")
    assert after.namespace == before.namespace
    assert after.layout == chosen
    assert (after.num_tokens, after.layers, after.state) == (
        content.num_tokens,
        LAYERS,
        {"seed": 1},
    )
    assert after.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(after.tensors[name], before.tensors[name]) for name in after.tensors)


@pytest.mark.parametrize(("noise", "suffix"), [(False, "planes"), (True, "raw")])
def test_archive_is_a_tar_that_standard_tools_read(
    noise: bool, suffix: str, store: SessionStore, path: Path
) -> None:
    content = make_content(2, 1, noise=noise)
    save(store, "chat", content)
    report = store.export("chat", path)
    found = content_of(path)
    numbers = range(2 * len(LAYERS))
    assert list(found) == [
        "manifest.json",
        "session.kvsession",
        *(f"records/{number:08d}.{suffix}" for number in numbers),
    ]
    payloads = [found[name][PAGE_BYTES:] for name in list(found)[2:]]
    if not noise:
        planes = [np.frombuffer(payload, np.uint8).reshape(4, -1) for payload in payloads]
        payloads = [plane.T.tobytes() for plane in planes]
    by_position = expected_payloads(content)
    assert payloads == [by_position[len(LAYERS) * p + layer] for layer in LAYERS for p in range(2)]
    assert report.num_shuffled == (0 if noise else len(numbers))


@pytest.mark.parametrize(("noise", "least", "most"), [(False, 0.7, 0.92), (True, 1.0, 1.05)])
def test_archive_is_smaller_than_numbers_and_hardly_larger_than_noise(
    noise: bool, least: float, most: float, store: SessionStore, path: Path
) -> None:
    layout = ChunkLayout(2, 64, 64, 64, torch.float32)
    save(store, "chat", make_content(8, 1, noise=noise, layout=layout))
    payload_bytes = 8 * len(LAYERS) * layout.chunk_bytes
    ratio = store.export("chat", path).archive_bytes / payload_bytes
    assert least < ratio < most


def test_export_of_the_same_session_twice_gives_the_same_bytes(
    store: SessionStore, path: Path
) -> None:
    save(store, "chat", make_content(3, 1))
    store.export("chat", path)
    first = path.read_bytes()
    store.export("chat", path, overwrite=True)
    assert path.read_bytes() == first


def test_shared_prefix_is_exported_with_each_session_and_stored_once(
    store: SessionStore, other: SessionStore, tmp_path: Path
) -> None:
    ids = make_token_ids(6, 3)
    short, long = make_content(4, 1, token_ids=ids), make_content(6, 1, token_ids=ids)
    save(store, "short", short)
    record_bytes = PAGE_BYTES + LAYOUT.slot_bytes
    assert save(store, "long", long) == 2 * len(LAYERS) * record_bytes
    store.export("short", tmp_path / "short")
    store.export("long", tmp_path / "long")
    written = [
        other.import_(tmp_path / path, name, trust_prefixes=True).written_bytes
        for path, name in (("short", None), ("long", None), ("long", "again"))
    ]
    assert written == [count * len(LAYERS) * record_bytes for count in (4, 2, 0)]
    other.delete("short")
    for name in ("long", "again"):
        assert read_back(other, name) == expected_payloads(long)


def test_rows_that_share_a_prefix_are_exported_once(
    store: SessionStore, other: SessionStore, path: Path
) -> None:
    ids = make_token_ids(4, 3).repeat(2, 1)
    ids[1, 40:] += 1
    content = make_content(4, 1, 2, ids)
    save(store, "chat", content)
    assert store.export("chat", path).num_chunks == 6 * len(LAYERS)
    other.import_(path)
    assert read_back(other, "chat") == expected_payloads(content)


def test_imported_prefix_that_is_trusted_is_found_by_its_tokens(
    store: SessionStore, other: SessionStore, path: Path
) -> None:
    ids, namespace = make_token_ids(4, 3), make_session_namespace()
    save(store, "chat", make_content(4, 1, token_ids=ids))
    store.export("chat", path)
    other.import_(path, trust_prefixes=True)
    found = other.find_prefix(
        namespace.model_digest, LAYOUT.chunk_tokens, ids, lambda layout: namespace.digest, LAYERS
    )
    assert found is not None
    assert len(found[1].rows[0]) == 4
    found[1].release()


def test_session_without_full_chunks_travels(
    store: SessionStore, other: SessionStore, path: Path
) -> None:
    save(store, "chat", make_content(0, 1))
    assert store.export("chat", path).num_chunks == 0
    assert other.import_(path).num_tokens == TAIL_TOKENS
    assert read_back(other, "chat") == []


def test_import_is_neither_pinned_nor_does_it_expire(
    store: SessionStore, other: SessionStore, path: Path
) -> None:
    store.save("chat", make_content(1, 1), pin=True, ttl_s=1000.0).held.release()
    store.export("chat", path)
    other.import_(path, "copy")
    info = other.info("copy")
    assert (info.is_pinned, info.expires_at) == (False, None)


def test_import_under_a_name_that_is_taken_is_refused_unless_told_to_replace(
    store: SessionStore, path: Path
) -> None:
    old, new = make_content(2, 1), make_content(3, 2)
    save(store, "chat", new)
    store.export("chat", path)
    store.delete("chat")
    save(store, "chat", old)
    before = state_of(store)
    for name in ("chat", None):
        with pytest.raises(ConfigError, match="there is a session 'chat' already"):
            store.import_(path, name)
    assert state_of(store) == before
    store.import_(path, overwrite=True)
    assert read_back(store, "chat") == expected_payloads(new)


def test_import_takes_the_name_of_a_session_that_has_expired(
    store: SessionStore, other: SessionStore, path: Path
) -> None:
    content = make_content(2, 1)
    save(store, "chat", content)
    store.export("chat", path)
    other.save("chat", make_content(1, 2), ttl_s=1e-6).held.release()
    other.import_(path)
    assert read_back(other, "chat") == expected_payloads(content)


@pytest.mark.parametrize("name", ["../chat", "", "x" * 129])
def test_import_under_an_impossible_name_is_refused(
    name: str, store: SessionStore, path: Path
) -> None:
    save(store, "chat", make_content(1, 1))
    store.export("chat", path)
    with pytest.raises(ConfigError, match="name"):
        store.import_(path, name)


def test_export_writes_a_private_file_and_nothing_else(store: SessionStore, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    save(store, "chat", make_content(1, 1))
    before = os.umask(0)
    try:
        store.export("chat", folder / "a")
    finally:
        os.umask(before)
    assert [entry.name for entry in folder.iterdir()] == ["a"]
    assert stat.S_IMODE((folder / "a").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("taken", "exists; overwrite replaces it"),
        ("link", "exists; overwrite replaces it"),
        ("missing/file", "No such file"),
        ("taken/file", "Not a directory"),
        (".", "is a folder"),
        ("root/file", "lies in the session store"),
        ("root/../root/segments/file", "lies in the session store"),
    ],
)
def test_export_to_an_impossible_path_is_refused(
    target: str, message: str, store: SessionStore, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    save(store, "chat", make_content(1, 1))
    before = state_of(store)
    with pytest.raises(ConfigError, match=message):
        store.export("chat", tmp_path / target)
    assert state_of(store) == before
    assert (tmp_path / "taken").read_text() == "mine"


def test_export_of_a_session_that_is_not_there_writes_nothing(
    store: SessionStore, path: Path
) -> None:
    with pytest.raises(SessionNotFound, match="no session 'chat'"):
        store.export("chat", path)
    assert not path.exists()


def test_progress_of_export_and_import_ends_with_everything(
    store: SessionStore, other: SessionStore, path: Path
) -> None:
    save(store, "chat", make_content(4, 1, token_ids=make_token_ids(4, 1)))
    num = 4 * len(LAYERS)
    calls: list[tuple[int, int]] = []
    store.export("chat", path, lambda *call: calls.append(call))
    assert calls == [(done, num) for done in range(1, num + 1)]
    for name in ("new", "known"):
        calls.clear()
        other.import_(path, name, lambda *call: calls.append(call), trust_prefixes=True)
        assert all(a[0] < b[0] for a, b in itertools.pairwise(calls))
        assert calls[-1] == (2 * num, 2 * num)


def test_imported_session_of_a_model_generates_the_same_tokens(
    store: SessionStore, other: SessionStore, path: Path, tmp_path: Path
) -> None:
    model = make_model("llama", "eager")
    capacity = tight_capacity(model, 2, 8)
    with OffloadedCache(
        ("gpu", "cpu", "disk"), capacity=capacity, disk_path=tmp_path / "scratch", chunk_tokens=8
    ) as cache:
        first = generate(model, cache, input_ids=prompt(2, 61)).tokens[0]
        cache.save("chat", store=store, token_ids=first)
        turn = torch.cat([first, prompt(2, 9, seed=5)], 1)
        expected = generate(model, cache, input_ids=turn).tokens[0]
    store.export("chat", path)
    other.import_(path)
    with OffloadedCache.load(
        "chat", model, store=other, capacity=capacity, disk_path=tmp_path / "scratch"
    ) as cache:
        assert torch.equal(generate(model, cache, input_ids=turn).tokens[0], expected)
