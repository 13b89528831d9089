"""Settings of sharing, and the threads that jobs of shared sessions run on."""

import threading
import time
from pathlib import Path

import pytest

from offload.daemon.ops.config_convert import engine_settings
from offload.daemon.ops.config_sources import load_configuration
from offload.daemon.sharing.remotes import Remotes
from offload.daemon.sharing.rounds import Rounds
from offload.daemon.sharing.sharing_settings import SharingSettings
from offload.daemon.sharing.sharing_state import SharingTally
from offload.daemon.sharing.strands import Strands
from offload.daemon.work.session_stores import SessionStores
from offload.errors import ConfigError, StorageError

REMOTE = {"tiers.remote.url": "s3://bucket/kv", "tiers.remote.secret_file": "/etc/secret"}


def settings_of(**options: object) -> SharingSettings | None:
    named = {key.replace("__", "."): value for key, value in options.items()}
    return engine_settings(load_configuration(None, {**REMOTE, **named}, {})).sharing


def test_sharing_is_off_unless_there_is_a_url() -> None:
    assert engine_settings(load_configuration(None, {}, {})).sharing is None


def test_sharing_is_what_the_configuration_says() -> None:
    changes = {"lease": "2m", "wait": "1s", "required": True}
    found = settings_of(**{f"tiers__remote__{key}": value for key, value in changes.items()})
    assert found == SharingSettings("s3://bucket/kv", Path("/etc/secret"), 120.0, 1.0, True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tiers.remote.secret_file", None, "needs tiers.remote.secret_file"),
        ("tiers.remote.url", None, "needs tiers.remote.url"),
        ("tiers.remote.lease", "0s", "greater than 0"),
    ],
)
def test_sharing_that_is_half_asked_for_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        engine_settings(load_configuration(None, {**REMOTE, key: value}, {}))


def test_sharing_of_encrypted_data_is_refused_with_the_reason(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o600)
    encryption = {
        "data_path": str(tmp_path / "data"),
        "tiers.disk.encryption.enabled": True,
        "tiers.disk.encryption.key_file": str(key),
    }
    with pytest.raises(ConfigError, match="would not be encrypted"):
        engine_settings(load_configuration(None, {**REMOTE, **encryption}, {}))


def test_url_of_no_store_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(ConfigError, match="no object store"):
        Remotes(SharingSettings("gopher://x", Path("secret")), str)


def test_tenants_have_one_place_in_all_stores_of_a_secret_and_another_in_others(
    tmp_path: Path,
) -> None:
    def places(data: str, secret: str) -> list[str]:
        stores = SessionStores(tmp_path / data, None, 0, None, tmp_path / secret)
        return [stores.prefix_of(tenant) for tenant in ("ann", "bob")]

    assert places("a", "one") == places("b", "one")
    assert len({*places("a", "one"), *places("c", "two")}) == 4
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o600


def test_secret_that_others_may_read_is_refused(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(32))
    secret.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        SessionStores(tmp_path / "data", None, 0, None, secret)


def test_secret_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no folder"):
        SessionStores(tmp_path / "data", None, 0, None, tmp_path / "no folder" / "secret")


@pytest.mark.leaks
def test_jobs_of_one_key_keep_their_order_while_others_go_on() -> None:
    strands, gate = Strands(2, "test"), threading.Event()
    done: list[int] = []
    first = strands.submit("a", gate.wait, 30.0)
    others = [strands.submit("a", done.append, number) for number in range(20)]
    assert strands.submit("b", lambda: "free").result(30.0) == "free"
    assert done == []
    gate.set()
    assert first.result(30.0)
    for job in others:
        job.result(30.0)
    strands.close()
    assert done == list(range(20))


@pytest.mark.leaks
def test_jobs_that_wait_when_strands_close_are_dropped() -> None:
    strands, started, gate = Strands(1, "test"), threading.Event(), threading.Event()

    def run() -> None:
        started.set()
        gate.wait(30.0)

    running, waiting = strands.submit("a", run), strands.submit("a", run)
    assert started.wait(30.0)
    closing = threading.Thread(target=strands.close)
    closing.start()
    while not waiting.cancelled():
        assert closing.is_alive()
    gate.set()
    closing.join()
    assert running.done()
    with pytest.raises(RuntimeError):
        strands.submit("a", run)


def test_error_of_a_job_that_nobody_waits_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    strands = Strands(1, "test")
    strands.post("a", lambda: 1 // 0)
    strands.submit("a", lambda: None).result(30.0)
    strands.close()
    assert "ZeroDivisionError" in caplog.text


@pytest.mark.leaks
def test_rounds_go_on_after_a_job_that_fails(caplog: pytest.LogCaptureFixture) -> None:
    enough, count = threading.Event(), [0]

    def fail() -> None:
        count[0] += 1
        if count[0] >= 3:
            enough.set()
        raise ZeroDivisionError

    rounds = Rounds((0.001, fail))
    rounds.start()
    assert enough.wait(30.0)
    rounds.close()
    assert "has failed" in caplog.text


def test_store_that_fails_is_left_alone_for_a_while_and_said_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    tally = SharingTally()
    for _ in range(3):
        tally.fail(StorageError("away"))
    assert tally.is_resting
    assert caplog.text.count("away") == 1
    assert tally.state(0, 0).failures == 3
    now[0] += 4.5
    assert not tally.is_resting
    tally.succeed()
    assert tally.state(0, 0).is_reachable
