"""Session stores with a key: nothing on disk tells content, and no key is never damage."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

from offload.errors import ConfigError, CorruptChunk
from offload.sessions.key_file import KEY_FILE, rotate_key
from offload.sessions.rebuild import rebuild
from offload.sessions.store import SessionStore
from offload.sessions.structure import check_files
from tests.support.encrypted_victim import KEY, NEEDLES, NUM_CHUNKS, SEED, TOKENS
from tests.support.sessions import (
    LAYOUT,
    expected_payloads,
    make_content,
    make_session_namespace,
    make_token_ids,
    read_back,
    save,
    small_store,
)

OTHER_KEY = bytes(32)
CONTENT = make_content(NUM_CHUNKS, SEED, token_ids=TOKENS)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return an encrypted root that holds a session."""
    path = tmp_path / "root"
    with small_store(path, key=KEY) as store:
        save(store, "chat", CONTENT)
    return path


@pytest.fixture
def store(root: Path) -> Iterator[SessionStore]:
    with small_store(root, key=KEY) as opened:
        yield opened


def files_of(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def found_needles(root: Path) -> list[str]:
    """Return which known bytes of content are in which files."""
    return [
        f"{name} in {path}"
        for path, content in files_of(root).items()
        for name, needle in NEEDLES.items()
        if needle in content
    ]


def data_of(root: Path) -> dict[Path, bytes]:
    """Return what the catalog, which every opening writes to, has no part in."""
    return {
        path: content
        for path, content in files_of(root).items()
        if path.suffix in (".kvseg", ".kvsession", ".json") or path.parent.name == "quarantine"
    }


def prefix_tokens(store: SessionStore, token_ids: Tensor) -> int:
    """Return how many tokens of a prompt the store has chunks for."""
    namespace = make_session_namespace()
    found = store.find_prefix(
        namespace.model_digest,
        LAYOUT.chunk_tokens,
        token_ids,
        lambda _: namespace.digest,
        (0, 1, 2),
    )
    if found is None:
        return 0
    found[1].release()
    return len(found[1].rows[0]) * LAYOUT.chunk_tokens


def test_no_file_of_an_encrypted_root_holds_what_is_in_a_plain_one(
    root: Path, tmp_path: Path
) -> None:
    with small_store(tmp_path / "plain") as plain:
        save(plain, "chat", CONTENT)
        found = found_needles(tmp_path / "plain")

    assert not found_needles(root)
    assert {name for name in NEEDLES if any(text.startswith(name) for text in found)} == {*NEEDLES}


def test_session_of_an_encrypted_root_has_the_bytes_that_were_saved(store: SessionStore) -> None:
    assert read_back(store, "chat") == expected_payloads(CONTENT)
    assert store.fsck().is_clean
    assert store.is_encrypted


def test_prefix_is_found_with_the_key_and_a_session_that_goes_on_shares_it(
    store: SessionStore,
) -> None:
    longer = make_token_ids(NUM_CHUNKS + 2, SEED)
    longer[:, : TOKENS.shape[1]] = TOKENS

    assert prefix_tokens(store, TOKENS) == NUM_CHUNKS * LAYOUT.chunk_tokens
    written = save(store, "more", make_content(NUM_CHUNKS + 2, SEED, token_ids=longer))
    assert written == 2 * 3 * store._root.format_of(LAYOUT, b"").record_bytes


def test_same_tokens_have_other_keys_in_another_root(root: Path, tmp_path: Path) -> None:
    with small_store(tmp_path / "other", key=KEY) as other, small_store(root, key=KEY) as store:
        save(other, "chat", CONTENT)
        keys = [
            {key for (key,) in each._root.catalog.rows("SELECT key FROM blocks")}
            for each in (store, other)
        ]

    assert len(keys[0]) == len(keys[1]) == NUM_CHUNKS
    assert keys[0].isdisjoint(keys[1])


@pytest.mark.parametrize("key", [None, OTHER_KEY], ids=["no key", "another key"])
@pytest.mark.parametrize(
    "use", [lambda root, key: small_store(root, key=key), lambda root, key: rebuild(root, key=key)]
)
def test_encrypted_root_without_its_key_is_refused_and_left_as_it_is(
    root: Path, use: Callable[..., object], key: bytes | None
) -> None:
    before = data_of(root)

    with pytest.raises(ConfigError, match=r"encrypted"):
        use(root, key)
    assert data_of(root) == before


@pytest.mark.parametrize("key", [None, KEY], ids=["no key", "its key"])
@pytest.mark.parametrize("loses_catalog", [False, True])
def test_root_whose_key_file_is_gone_is_refused_and_left_as_it_is(
    root: Path, key: bytes | None, loses_catalog: bool
) -> None:
    (root / KEY_FILE).unlink()
    if loses_catalog:
        (root / "catalog.sqlite3").unlink()
    before = data_of(root)

    with pytest.raises(ConfigError):
        small_store(root, key=key)
    assert data_of(root) == before


def test_plain_root_opened_with_a_key_is_refused_and_still_opens_without(tmp_path: Path) -> None:
    root = tmp_path / "plain"
    with small_store(root) as plain:
        save(plain, "chat", CONTENT)

    with pytest.raises(ConfigError, match="made without a key"):
        small_store(root, key=KEY)
    with small_store(root) as plain:
        assert read_back(plain, "chat") == expected_payloads(CONTENT)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: text.replace(b'key": "', b'key": "AAAA'),
        lambda _: b"[]",
    ],
    ids=["cut off", "another key", "no object"],
)
def test_damaged_key_file_is_no_damage_of_the_sessions(
    root: Path, damage: Callable[[bytes], bytes]
) -> None:
    good = (root / KEY_FILE).read_bytes()
    (root / KEY_FILE).write_bytes(damage(good))

    with pytest.raises(ConfigError, match="damaged"):
        small_store(root, key=KEY)
    (root / KEY_FILE).write_bytes(good)
    with small_store(root, key=KEY) as store:
        assert read_back(store, "chat") == expected_payloads(CONTENT)


def test_root_whose_key_was_changed_opens_with_the_new_one_only(root: Path) -> None:
    before = {path: data for path, data in data_of(root).items() if path.name != KEY_FILE}

    rotate_key(root, KEY, OTHER_KEY)

    with pytest.raises(ConfigError, match="not the key"):
        small_store(root, key=KEY)
    with small_store(root, key=OTHER_KEY) as store:
        assert read_back(store, "chat") == expected_payloads(CONTENT)
    assert before.items() <= data_of(root).items()
    assert (root / KEY_FILE).stat().st_mode & 0o777 == 0o600


def test_key_is_not_changed_by_who_does_not_have_it(root: Path) -> None:
    with pytest.raises(ConfigError, match="not the key"):
        rotate_key(root, OTHER_KEY, KEY)
    with pytest.raises(ConfigError, match="no key that could be changed"):
        rotate_key(root.parent, KEY, OTHER_KEY)


def test_catalog_that_is_lost_is_made_again_with_the_key(root: Path) -> None:
    (root / "catalog.sqlite3").unlink()

    with small_store(root, key=KEY) as store:
        assert read_back(store, "chat") == expected_payloads(CONTENT)
        assert prefix_tokens(store, TOKENS) == NUM_CHUNKS * LAYOUT.chunk_tokens
    assert not found_needles(root)


def test_flipped_byte_of_a_segment_is_quarantined_and_ends_the_prefix(root: Path) -> None:
    [path] = root.rglob("*.kvseg")
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)

    with small_store(root, key=KEY) as store:
        [bad] = store.fsck(repair=True).bad_records
        assert bad.index == 0
        with pytest.raises(CorruptChunk):
            store.open("chat")
        assert prefix_tokens(store, TOKENS) == 0
    assert not found_needles(root)


@pytest.mark.parametrize("offset", [20, 33, 4096, 4200, -1])
def test_flipped_byte_of_a_session_file_is_corrupt(root: Path, offset: int) -> None:
    [path] = root.rglob("*.kvsession")
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)

    with small_store(root, key=KEY) as store, pytest.raises(CorruptChunk):
        store.open("chat")


def test_session_file_under_the_name_of_another_is_corrupt(root: Path) -> None:
    with small_store(root, key=KEY) as store:
        save(store, "other", make_content(2, SEED + 1))
    paths = sorted(root.rglob("*.kvsession"))
    shutil.copy(paths[0], paths[1])

    with small_store(root, key=KEY) as store:
        report = store.fsck()
    assert len(report.bad_sessions) == 1
    assert "not what was sealed" in next(iter(report.bad_sessions.values()))


def test_renamed_pinned_session_is_sealed_again(store: SessionStore, root: Path) -> None:
    store.rename("chat", "talk")
    store.pin("talk")

    assert read_back(store, "talk") == expected_payloads(CONTENT)
    assert store.info("talk").is_pinned
    assert not found_needles(root)


@pytest.mark.parametrize("trusts", [True, False])
@pytest.mark.parametrize("to_key", [None, OTHER_KEY], ids=["to a plain root", "to another key"])
def test_archive_of_an_encrypted_session_is_plain_and_goes_anywhere(
    store: SessionStore, tmp_path: Path, trusts: bool, to_key: bytes | None
) -> None:
    path = tmp_path / "chat.kv.tar.zst"
    store.export("chat", path)

    with small_store(tmp_path / "other", key=to_key) as other:
        other.import_(path, trust_prefixes=trusts)
        assert read_back(other, "chat") == expected_payloads(CONTENT)
        expected = NUM_CHUNKS * LAYOUT.chunk_tokens if trusts else 0
        assert prefix_tokens(other, TOKENS) == expected


def test_structure_is_checked_without_the_key(root: Path) -> None:
    report = check_files(root, lambda done, total: None)

    assert not report.bad
    assert (report.num_sessions, report.num_records) == (1, NUM_CHUNKS * 3)


@pytest.mark.parametrize(
    ("pattern", "offset", "num_good"),
    [("*.kvseg", 100, 11), ("*.kvseg", 5000, 11), ("*.kvseg", -1, 11), ("*.kvsession", 4100, 12)],
)
def test_damage_is_found_without_the_key_and_nothing_is_moved(
    root: Path, pattern: str, offset: int, num_good: int
) -> None:
    [path] = root.rglob(pattern)
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    before = data_of(root)

    report = check_files(root, lambda done, total: None)

    assert len(report.bad) == 1
    assert report.num_records == num_good
    assert data_of(root) == before


def test_writer_killed_in_the_middle_of_a_save_leaves_nothing_readable(tmp_path: Path) -> None:
    root = tmp_path / "root"
    command = [sys.executable, "-m", "tests.support.encrypted_victim", str(root)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, cwd=Path(__file__).parents[2]
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"in the middle\n"
        child.kill()
    assert [path for path in root.rglob("*.tmp") if path.stat().st_size]
    assert not found_needles(root)

    with small_store(root, key=KEY) as store:
        assert [info.name for info in store.list()] == ["chat"]
        assert read_back(store, "chat") == expected_payloads(CONTENT)
        assert store.fsck().is_clean
    assert not list(root.rglob("*.tmp"))
