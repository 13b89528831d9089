"""Sessions in an object store, under the faults of stores and of other owners."""

import json
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import xxhash

from offload.errors import (
    ConfigError,
    CorruptChunk,
    SessionInUse,
    SessionNotFound,
    StorageError,
)
from offload.sessions.remote_log import ManifestLog
from offload.sessions.remote_manifest import FORMAT, Manifest, parse_manifest
from offload.sessions.remote_sessions import RemoteSessions
from tests.support.faulty_proxy import faulty_proxy
from tests.support.remote import folder_bucket, s3_bucket
from tests.support.remote_sessions import Machine, NewMachine, machines, objects_in
from tests.support.s3_server import s3_server
from tests.support.sessions import (
    expected_payloads,
    make_content,
    make_token_ids,
    read_back,
    save,
    state_of,
)

WAIT_S = 30.0
IDS = make_token_ids(8, 1)
SHORT, LONG = make_content(3, 1, token_ids=IDS), make_content(6, 1, token_ids=IDS)
OTHER = make_content(3, 2, token_ids=make_token_ids(3, 9))


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as port:
        s3_bucket(port, "warm").list("nothing")  # starts obstore's threads, for all tests
        yield port


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[NewMachine]:
    with machines(tmp_path) as make:
        yield make


@pytest.mark.parametrize("fault", ["slow down", "internal error", "cut", "lost", "flip"])
def test_session_moves_to_another_machine_whatever_happens_on_the_way(
    tmp_path: Path, port: int, fault: str
) -> None:
    prefix = uuid.uuid4().hex
    with faulty_proxy(port) as (proxy, proxy_port):
        bucket = s3_bucket(proxy_port, prefix, deadline_s=1e4)
        with Machine(tmp_path, bucket, "a") as a:
            save(a.store, "s", LONG)
            if fault != "flip":
                proxy.strike(fault, 10, "PUT")
            a.remote.publish(a.store, "s")
            a.remote.release("s")
        with Machine(tmp_path, s3_bucket(proxy_port, prefix, deadline_s=1e4), "b") as b:
            if fault == "flip":
                proxy.strike("flip", 1, "/blocks/")
            else:
                proxy.strike(fault, 10, "GET")
            report = b.remote.fetch(b.store, "s")
            assert report.epoch == 2
            assert read_back(b.store, "s") == expected_payloads(LONG)
    assert len(proxy.requests) > 30 or fault == "flip"


@pytest.mark.parametrize("fault", ["expired", "skewed", "denied"])
def test_publication_that_is_refused_half_way_changes_nothing_that_others_see(
    tmp_path: Path, port: int, fault: str
) -> None:
    with faulty_proxy(port) as (proxy, proxy_port):
        bucket = s3_bucket(proxy_port, uuid.uuid4().hex)
        with Machine(tmp_path, bucket, "a") as a:
            save(a.store, "s", SHORT)
            a.remote.publish(a.store, "s")
            save(a.store, "s", LONG)
            proxy.strike(fault, 1_000, "PUT")
            with pytest.raises(StorageError, match="403"):
                a.remote.publish(a.store, "s")
            [info] = a.remote.list()
            assert info.num_tokens == SHORT.num_tokens
            proxy.relent()
            assert a.remote.publish(a.store, "s").num_blocks == 6


def test_eight_owners_that_take_one_session_at_once_make_one_owner(
    tmp_path: Path, port: int
) -> None:
    prefix, start = uuid.uuid4().hex, threading.Barrier(8)
    with Machine(tmp_path, s3_bucket(port, prefix), "maker") as maker:
        save(maker.store, "s", SHORT)
        maker.remote.publish(maker.store, "s")
        maker.remote.release("s")

        def take(number: int) -> int | None:
            with Machine(tmp_path, s3_bucket(port, prefix), f"m{number}") as each:
                start.wait(WAIT_S)
                try:
                    return each.remote.take("s")
                except SessionInUse:
                    return None

        with ThreadPoolExecutor(8) as pool:
            epochs = list(pool.map(take, range(8)))
        assert [epoch for epoch in epochs if epoch is not None] == [2]


def test_eight_machines_that_publish_the_same_chunks_store_them_once(
    tmp_path: Path, port: int
) -> None:
    prefix, start = uuid.uuid4().hex, threading.Barrier(8)

    def publish(number: int) -> int:
        with Machine(tmp_path, s3_bucket(port, prefix), f"m{number}") as each:
            save(each.store, f"s{number}", SHORT)
            start.wait(WAIT_S)
            return each.remote.publish(each.store, f"s{number}").num_blocks

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(publish, range(8))) == [3] * 8
    assert len(s3_bucket(port, prefix).list("blocks")) == 3
    with Machine(tmp_path, s3_bucket(port, prefix), "reader") as reader:
        assert len(reader.remote.list()) == 8
        reader.remote.fetch(reader.store, "s5", take=False)
        assert read_back(reader.store, "s5") == expected_payloads(SHORT)


def test_session_with_a_living_lease_is_not_taken_and_says_whose_it_is(machine: NewMachine) -> None:
    a, b = machine("a"), machine("b")
    save(a.store, "s", SHORT)
    a.remote.publish(a.store, "s")
    with pytest.raises(SessionInUse, match=r"belongs to a \(epoch 1\) for another 300 s"):
        b.remote.fetch(b.store, "s")
    assert b.remote.fetch(b.store, "s", take=False).epoch == 1
    b.clock.now_s += 301
    assert b.remote.take("s") == 2


def test_work_that_takes_longer_than_a_lease_keeps_the_session(machine: NewMachine) -> None:
    a, b, c = machine("a"), machine("b"), machine("c")

    def wait(done: int, total: int) -> None:
        for each in (a, b, c):
            each.clock.now_s += 200.0
        with pytest.raises(SessionInUse, match="for another 100 s"):
            c.remote.take("s")

    save(a.store, "s", SHORT)
    a.remote.publish(a.store, "s")
    save(a.store, "s", LONG)
    a.remote.publish(a.store, "s", progress=wait)
    a.remote.release("s")
    b.remote.fetch(b.store, "s", progress=wait)
    assert b.remote.list()[0].owner == "b"


def test_old_owner_cannot_write_after_another_has_taken_over(machine: NewMachine) -> None:
    a, b = machine("a"), machine("b")
    save(a.store, "s", SHORT)
    a.remote.publish(a.store, "s")
    b.clock.now_s += 301  # the clock of b is fast: a's lease has not ended by its own
    b.remote.fetch(b.store, "s")
    save(a.store, "s", LONG)
    for attempt in (a.remote.publish, lambda *_: a.remote.renew("s")):
        with pytest.raises(SessionInUse, match=r"changed by b|does not belong"):
            attempt(a.store, "s")
    assert b.remote.list()[0].num_tokens == SHORT.num_tokens
    save(b.store, "s", LONG)
    assert b.remote.publish(b.store, "s").epoch == 2


def test_old_owner_does_not_replace_what_it_has_not_seen(machine: NewMachine) -> None:
    a, b = machine("a"), machine("b")
    save(a.store, "s", SHORT)
    a.remote.publish(a.store, "s")
    a.remote.release("s")
    b.remote.fetch(b.store, "s")
    save(b.store, "s", LONG)
    b.remote.publish(b.store, "s")
    b.remote.release("s")
    with pytest.raises(ConfigError, match="does not go on from it"):
        a.remote.publish(a.store, "s")
    assert a.remote.list()[0].num_tokens == LONG.num_tokens
    assert a.remote.publish(a.store, "s", overwrite=True).num_blocks == 3


def test_stale_version_is_refused_even_where_its_successor_was_collected(tmp_path: Path) -> None:
    bucket = folder_bucket(tmp_path / "bucket")
    log = ManifestLog(bucket)
    first = log.append(Manifest("s", 0, 0, "a"), epoch=1)
    second = log.append(first, owner="b", epoch=2)
    third = log.append(second)
    bucket.delete([second.object_name])
    with pytest.raises(SessionInUse, match="version 3, we go on from version 1"):
        log.append(first)
    assert log.newest("s") == third


def test_version_that_another_goes_on_from_at_once_counts_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = folder_bucket(tmp_path / "bucket")
    log, other = ManifestLog(bucket), ManifestLog(folder_bucket(tmp_path / "bucket"))
    first, create = log.append(Manifest("s", 0, 0, "a"), epoch=1), bucket.create

    def create_and_be_followed(name: str, content: bytes) -> bool:
        is_written = create(name, content)
        newest = other.newest("s")
        assert newest is not None
        other.append(newest, owner="b", epoch=2)
        return is_written

    monkeypatch.setattr(bucket, "create", create_and_be_followed)
    released = log.append(first, lease_until=0.0)

    newest = log.newest("s")
    assert newest is not None
    assert (released.number, newest.number, newest.owner) == (2, 3, "b")
    with pytest.raises(SessionInUse):
        log.append(released)


def test_manifest_of_the_first_version_is_read() -> None:
    fields = asdict(Manifest("s", 3, 1, "a", file="f", nonce="n"))
    del fields["notes"], fields["previous"]
    text = json.dumps({"format": FORMAT, "version": 1, **fields})
    content = f"{xxhash.xxh3_64_hexdigest(text.encode())} {text}\n".encode()
    assert parse_manifest(content, "x") == Manifest("s", 3, 1, "a", file="f", nonce="n")


def test_publishing_again_uploads_what_was_added_only(machine: NewMachine) -> None:
    a = machine("a")
    save(a.store, "s", SHORT)
    assert a.remote.publish(a.store, "s").written_blocks == 3
    save(a.store, "s", LONG)
    report = a.remote.publish(a.store, "s")
    assert (report.num_blocks, report.written_blocks) == (6, 3)
    assert a.remote.publish(a.store, "s").written_blocks == 0
    assert a.remote.publish(a.store, "s", rewrite=True).written_blocks == 6


@pytest.mark.parametrize("victim", ["blocks/", "sessions/"])
@pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
def test_damaged_object_is_an_error_and_leaves_the_local_store_as_it_was(
    machine: NewMachine, tmp_path: Path, victim: str, harm: str
) -> None:
    a, b = machine("a"), machine("b")
    save(a.store, "s", SHORT)
    a.remote.publish(a.store, "s")
    a.remote.release("s")
    before = state_of(b.store)
    for name in objects_in(tmp_path / "bucket", victim):
        path = tmp_path / "bucket" / name
        if name.endswith(".json"):
            continue
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 4
        if harm == "gone":
            path.unlink()
        else:
            path.write_bytes(content if harm == "flipped" else content[: len(content) // 2])
    with pytest.raises(CorruptChunk):
        b.remote.fetch(b.store, "s")
    assert state_of(b.store) == before
    assert b.remote.list()[0].owner is None
    a.remote.publish(a.store, "s", rewrite=True)
    a.remote.release("s")
    b.remote.fetch(b.store, "s")
    assert read_back(b.store, "s") == expected_payloads(SHORT)


def test_session_that_is_deleted_or_expired_is_not_found(machine: NewMachine) -> None:
    a = machine("a")
    a.clock.now_s = 0.0
    for name in ("s", "t"):
        save(a.store, name, SHORT)
    a.store.set_ttl("t", 1000.0)
    expires_at = a.store.info("t").expires_at
    assert expires_at is not None
    for name in ("s", "t"):
        a.remote.publish(a.store, name)
    assert len(a.remote.list()) == 2
    a.remote.delete("s")
    a.clock.now_s = expires_at
    assert a.remote.list() == []
    for name in ("s", "t", "u"):
        with pytest.raises(SessionNotFound, match="no session"):
            a.remote.fetch(a.store, name, overwrite=True)


@pytest.mark.parametrize("argument", ["lease_s", "grace_s", "num_threads"])
def test_argument_that_is_not_positive_is_refused(argument: str) -> None:
    arguments: dict[str, Any] = {argument: 0}
    with pytest.raises(ConfigError, match=argument):
        RemoteSessions("memory:///", **arguments)
