"""Stores of tenants: apart, private, and found again with the same secret only."""

from pathlib import Path

import pytest

from offload.daemon.work.session_book import Realm
from offload.daemon.work.session_stores import SessionStores
from offload.errors import ConfigError
from tests.support.daemon import Stepped, settings_in, tiny

ANN, BOB = Realm("ann"), Realm("bob")
REALMS = [ANN, BOB, Realm("ann", "pepper"), Realm("ann", ""), Realm("annpepper")]


def open_stores(path: Path) -> SessionStores:
    return SessionStores(path, None, 0)


def test_every_realm_has_its_own_salt_and_keeps_it(tmp_path: Path) -> None:
    salts = [open_stores(tmp_path).salt(realm) for realm in REALMS]

    assert salts == [open_stores(tmp_path).salt(realm) for realm in REALMS]
    assert len({*salts}) == len(REALMS) - 1  # an empty salt narrows nothing
    assert salts != [open_stores(tmp_path / "other").salt(realm) for realm in REALMS]


def test_folders_do_not_tell_whose_they_are(tmp_path: Path) -> None:
    stores = open_stores(tmp_path)
    paths = {stores.of(realm).path for realm in (ANN, BOB, Realm("ann", "pepper"))}
    stores.close()

    assert len(paths) == 2
    assert all("ann" not in part for path in paths for part in path.relative_to(tmp_path).parts)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600


def test_secret_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    open_stores(tmp_path)
    (tmp_path / "secret").write_bytes(b"short")

    with pytest.raises(ConfigError, match="5 bytes"):
        open_stores(tmp_path)


def test_notes_are_read_again_and_damaged_ones_are_none(tmp_path: Path) -> None:
    stores = open_stores(tmp_path)
    stores.of(ANN)
    stores.write_notes("ann", {"chat": {"parent": None}})
    stores.close()

    assert open_stores(tmp_path).read_notes("ann") == {"chat": {"parent": None}}
    [path] = tmp_path.rglob("sessions.json")
    path.write_text("{")
    assert open_stores(tmp_path).read_notes("ann") == {}


def test_stores_of_salts_that_nobody_uses_are_closed(tmp_path: Path) -> None:
    with Stepped(tiny(), settings_in(tmp_path, persist="write_through")) as engine:
        for number in range(70):
            engine.run([3, 4, 5, 6, 7], cache_salt=str(number), session=f"s{number}")
            engine.keeper.evict("ann", f"s{number}", "disk")

        assert len(engine.worker.parts.stores.realms) <= 65
        again = engine.run([3, 4, 5, 6, 7], cache_salt="0", session="s0")
        assert again.started.cached.disk == 4
