"""Key files, the key of the daemon's data, and what of its answers is sealed with it."""

import base64
from pathlib import Path

import pytest

from offload.daemon.http.store import HttpStore, StoredAnswer, StoredResponse
from offload.daemon.ops.config_convert import engine_settings, http_options
from offload.daemon.ops.config_sources import load_configuration
from offload.daemon.ops.configuration import Configuration
from offload.errors import ConfigError, CorruptChunk
from offload.key_files import make_key_file, read_key_file
from offload.tiers.sealing import Sealer

KEY = bytes(range(200, 232))
SAID = "the secret of the house"
FORMS = {
    "raw": KEY,
    "hex": KEY.hex().encode() + b"\n",
    "base64": base64.b64encode(KEY),
}


def key_file(path: Path, content: bytes = KEY, mode: int = 0o600) -> Path:
    path.write_bytes(content)
    path.chmod(mode)
    return path


def configured(tmp_path: Path, key: Path | None, enabled: bool = True) -> Configuration:
    options = {
        "data_path": str(tmp_path / "data"),
        "tiers.disk.encryption.enabled": str(enabled).lower(),
        "tiers.use": '["disk"]',
    }
    if key is not None:
        options["tiers.disk.encryption.key_file"] = str(key)
    return load_configuration(None, options, {})


def fill(folder: Path, sealer: Sealer | None) -> HttpStore:
    store = HttpStore(folder, 1000.0, 100, 1 << 30, sealer)
    body = {"id": "r1", "output": [{"id": "o1", "text": SAID}]}
    store.put_response("ann", StoredResponse(None, "chat", body, [{"id": "i1", "text": SAID}]))
    store.put_conversation("ann", {"id": "c1", "metadata": {"said": SAID}})
    store.add_items("ann", "c1", [{"id": "m1", "text": SAID}])
    store.put_answer("ann", "d1g35t", StoredAnswer("chat", SAID, SAID.encode()))
    return store


def content_of(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.iterdir())


@pytest.mark.parametrize("content", FORMS.values(), ids=FORMS)
def test_key_file_of_every_form_is_the_key(content: bytes, tmp_path: Path) -> None:
    assert read_key_file(key_file(tmp_path / "key", content)) == KEY


@pytest.mark.parametrize("content", [b"", KEY[:31], KEY + b"x", b"z" * 64, b"0" * 62, b"=" * 44])
def test_file_that_holds_no_key_is_refused(content: bytes, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="which are not 32 bytes"):
        read_key_file(key_file(tmp_path / "key", content))


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_key_file_that_others_may_read_is_refused(mode: int, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="chmod 600"):
        read_key_file(key_file(tmp_path / "key", mode=mode))


def test_made_key_is_new_private_and_never_overwritten(tmp_path: Path) -> None:
    make_key_file(tmp_path / "a")
    make_key_file(tmp_path / "b")

    assert read_key_file(tmp_path / "a") != read_key_file(tmp_path / "b")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600
    with pytest.raises(ConfigError, match="cannot make"):
        make_key_file(tmp_path / "a")


def test_configured_key_gives_engine_and_http_the_same_sealer(tmp_path: Path) -> None:
    found = configured(tmp_path, key_file(tmp_path / "key"))
    sealers = [engine_settings(found).sealer, http_options(found).sealer]

    assert sealers[0] is not None
    assert sealers[1] is not None
    assert sealers[0].derive("test") == sealers[1].derive("test") != Sealer(KEY).derive("test")
    assert KEY.hex() not in repr(engine_settings(found))


def test_encryption_without_a_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs tiers\.disk\.encryption\.key_file"):
        engine_settings(configured(tmp_path, None))


def test_encrypted_data_without_encryption_is_refused(tmp_path: Path) -> None:
    engine_settings(configured(tmp_path, key_file(tmp_path / "key")))

    with pytest.raises(ConfigError, match="is encrypted"):
        engine_settings(configured(tmp_path, None, enabled=False))


@pytest.mark.parametrize("name", ["tenants", "http.sqlite3"])
def test_plain_data_with_encryption_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "data" / name).mkdir(parents=True)

    with pytest.raises(ConfigError, match="made without a key"):
        engine_settings(configured(tmp_path, key_file(tmp_path / "key")))


def test_stored_answers_come_back_and_the_file_does_not_hold_what_was_said(tmp_path: Path) -> None:
    sealer = Sealer(KEY)
    fill(tmp_path, sealer).close()
    store = HttpStore(tmp_path, 1000.0, 100, 1 << 30, sealer)

    assert [item["text"] for item in store.history("ann", "r1")] == [SAID, SAID]
    assert store.conversation("ann", "c1")["metadata"] == {"said": SAID}
    assert store.items("ann", "c1") == [{"id": "m1", "text": SAID}]
    assert store.answer("ann", "d1g35t") == (SAID, SAID.encode())
    assert store.answer("ann", "another") is None
    assert SAID.encode() not in content_of(tmp_path)
    assert b"d1g35t" not in content_of(tmp_path)
    store.close()


def test_stored_answers_without_a_key_are_what_they_were(tmp_path: Path) -> None:
    store = fill(tmp_path, None)
    rows = store._tables.run("SELECT id, opening, token_ids FROM answers")

    assert rows == [("d1g35t", SAID, SAID.encode())]
    assert SAID.encode() in content_of(tmp_path)
    store.close()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE responses SET body = input",
        'UPDATE responses SET body = \'{"id": "r1", "output": []}\'',
        "UPDATE responses SET tenant = 'bob'",
        "UPDATE responses SET body = zeroblob(200)",
    ],
    ids=["swapped", "plain", "of another tenant", "zeros"],
)
def test_stored_response_that_somebody_changed_is_an_error(change: str, tmp_path: Path) -> None:
    store = fill(tmp_path, Sealer(KEY))
    store._tables.run(change)

    with pytest.raises(CorruptChunk):
        store.response("bob" if "bob" in change else "ann", "r1")
    store.close()
