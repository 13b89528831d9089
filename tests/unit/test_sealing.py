"""Sealed bytes: back as they were for who has the key, and an error for everybody else."""

import secrets

import pytest

from offload.errors import ConfigError, CorruptChunk
from offload.tiers import sealing
from offload.tiers.sealing import SALT_BYTES, TAG_BYTES, Sealer

KEY = bytes(range(32))
TEXT = b"the quick brown fox jumps over the lazy dog"


@pytest.mark.parametrize("size", [0, 1, 99, 100, 101, 250, 300])
def test_blob_of_any_size_comes_back_and_shows_nothing(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "_PIECE_BYTES", 100)
    content = secrets.token_bytes(size)

    sealed = Sealer(KEY).seal("test", content, b"here")

    assert Sealer(KEY).open("test", sealed, b"here", "blob") == content
    assert len(sealed) == SALT_BYTES + size + TAG_BYTES * max(1, -(-size // 100))
    assert size < 9 or content[:9] not in sealed


def test_same_content_sealed_twice_has_nothing_in_common() -> None:
    first, second = (Sealer(KEY).seal("test", TEXT, b"") for _ in range(2))

    assert first[:SALT_BYTES] != second[:SALT_BYTES]
    assert first[SALT_BYTES:] != second[SALT_BYTES:]


@pytest.mark.parametrize(
    ("key", "purpose", "context"),
    [(bytes(32), "test", b"here"), (KEY, "other", b"here"), (KEY, "test", b"there")],
    ids=["another key", "another purpose", "another place"],
)
def test_blob_opens_with_its_own_key_purpose_and_place_only(
    key: bytes, purpose: str, context: bytes
) -> None:
    sealed = Sealer(KEY).seal("test", TEXT, b"here")

    with pytest.raises(CorruptChunk, match="is not what was sealed"):
        Sealer(key).open(purpose, sealed, context, "blob")


@pytest.mark.parametrize("number", range(SALT_BYTES + len(TEXT) + TAG_BYTES))
def test_blob_with_any_byte_flipped_is_corrupt(number: int) -> None:
    sealed = bytearray(Sealer(KEY).seal("test", TEXT, b"here"))
    sealed[number] ^= 1

    with pytest.raises(CorruptChunk):
        Sealer(KEY).open("test", bytes(sealed), b"here", "blob")


@pytest.mark.parametrize("kept", [0, 31, 32, 47, 48 + 100, 32 + 2 * 116, 32 + 3 * 116 - 1])
def test_blob_that_was_cut_off_is_corrupt_wherever(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealing, "_PIECE_BYTES", 100)
    sealed = Sealer(KEY).seal("test", bytes(300), b"")

    with pytest.raises(CorruptChunk):
        Sealer(KEY).open("test", sealed[:kept], b"", "blob")


def test_pieces_that_changed_places_are_corrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "_PIECE_BYTES", 100)
    sealed = Sealer(KEY).seal("test", bytes(200), b"")
    salt, first, second = sealed[:32], sealed[32:148], sealed[148:]

    with pytest.raises(CorruptChunk, match="piece 0 of 2"):
        Sealer(KEY).open("test", salt + second + first, b"", "blob")


@pytest.mark.parametrize("key", [b"", bytes(16), bytes(33), "0" * 32], ids=repr)
def test_key_of_another_length_is_refused(key: bytes) -> None:
    with pytest.raises(ConfigError, match="32 bytes"):
        Sealer(key)


def test_missing_package_is_an_error_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        __import__("sys").modules, "cryptography.hazmat.primitives.ciphers.aead", None
    )

    with pytest.raises(ConfigError, match=r"pip install 'kv-offload\[encryption\]'"):
        Sealer(KEY)
