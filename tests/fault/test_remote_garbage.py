"""Collections of garbage in an object store, at the worst of times."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload.errors import CorruptChunk, StorageError
from tests.support.remote import folder_bucket, s3_bucket
from tests.support.remote_sessions import Machine, NewMachine, age, machines, objects_in
from tests.support.s3_server import s3_server
from tests.support.sessions import (
    expected_payloads,
    make_content,
    make_token_ids,
    read_back,
    save,
)

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


def test_collection_removes_what_nothing_names_in_two_rounds_and_nothing_else(
    machine: NewMachine, tmp_path: Path
) -> None:
    a, folder = machine("a"), tmp_path / "bucket"
    for name, content in (("s", LONG), ("t", SHORT), ("o", OTHER)):
        save(a.store, name, content)
        a.remote.publish(a.store, name)
    for name in ("s", "o"):
        a.remote.delete(name)
    a.clock.now_s += 1000
    assert a.remote.collect().num_condemned == 0  # all of it is young
    age(folder, 4000)
    report = a.remote.collect()
    assert (report.num_sessions, report.num_condemned) == (1, 3 + 3 + 2)
    assert len(objects_in(folder, "blocks/")) == 9
    age(folder, 4000, "condemned/")
    assert a.remote.collect().num_removed == 8
    assert len(objects_in(folder, "blocks/")) == 3
    a.remote.release("t")
    b = machine("b")
    b.remote.fetch(b.store, "t")
    assert read_back(b.store, "t") == expected_payloads(SHORT)
    age(folder, 1e6, "condemned/")
    a.remote.collect()
    assert objects_in(folder, "condemned/") == []


def test_collection_over_s3_finds_everything_young_and_keeps_it(tmp_path: Path, port: int) -> None:
    with Machine(tmp_path, s3_bucket(port, uuid.uuid4().hex), "a") as a:
        save(a.store, "s", SHORT)
        a.remote.publish(a.store, "s")
        save(a.store, "s", OTHER)
        a.remote.publish(a.store, "s")
        report = a.remote.collect()
        assert (report.num_sessions, report.num_condemned, report.num_removed) == (1, 0, 0)
        a.remote.fetch(a.store, "s", overwrite=True)
        assert read_back(a.store, "s") == expected_payloads(OTHER)


def test_publisher_never_relies_on_what_is_condemned(machine: NewMachine, tmp_path: Path) -> None:
    a, b, folder = machine("a"), machine("b"), tmp_path / "bucket"
    save(a.store, "s", SHORT)
    a.remote.publish(a.store, "s")
    a.remote.delete("s")
    a.clock.now_s += 1000
    age(folder, 4000)
    a.remote.collect()
    save(b.store, "s", LONG)
    assert b.remote.publish(b.store, "s").written_blocks == 6  # its own, beside the condemned ones
    age(folder, 4000)
    a.remote.collect()
    a.remote.collect()
    b.remote.release("s")
    a.remote.fetch(a.store, "s", overwrite=True)
    assert read_back(a.store, "s") == expected_payloads(LONG)


@pytest.mark.parametrize("seed", range(3))
def test_collection_at_any_moment_of_a_publication_loses_nothing(
    machine: NewMachine, tmp_path: Path, seed: int
) -> None:
    a, b, folder = machine("a"), machine("b"), tmp_path / "bucket"
    save(a.store, "old", LONG)
    a.remote.publish(a.store, "old")
    a.remote.delete("old")
    a.clock.now_s += 1000
    age(folder, 4000)
    save(b.store, "s", LONG)
    rounds: list[int] = []

    def collect(done: int, total: int) -> None:
        if done % 3 == seed:
            rounds.append(a.remote.collect().num_removed)

    b.remote.publish(b.store, "s", progress=collect)
    assert len(rounds) >= 2
    b.remote.release("s")
    assert len(objects_in(folder, "condemned/")) == 1  # it names what was published meanwhile
    age(folder, 4000)
    assert a.remote.collect().num_sessions == 1
    c = machine("c")
    c.remote.fetch(c.store, "s")
    assert read_back(c.store, "s") == expected_payloads(LONG)


def test_publication_that_takes_longer_than_is_safe_is_not_published(tmp_path: Path) -> None:
    bucket = folder_bucket(tmp_path / "bucket")
    with Machine(tmp_path, bucket, "a", grace_s=1e-9) as a:
        save(a.store, "s", SHORT)
        with pytest.raises(StorageError, match="at most half of grace_s"):
            a.remote.publish(a.store, "s")
        assert a.remote.list() == []


def test_damaged_manifest_is_an_error_and_stops_the_collection(
    machine: NewMachine, tmp_path: Path
) -> None:
    a = machine("a")
    for name in ("s", "t"):
        save(a.store, name, SHORT)
        a.remote.publish(a.store, name)
    newest = [name for name in objects_in(tmp_path / "bucket", "sessions/") if "json" in name][-1]
    content = (tmp_path / "bucket" / newest).read_bytes()
    (tmp_path / "bucket" / newest).write_bytes(content.replace(b"blocks", b"blockz"))
    before = objects_in(tmp_path / "bucket")
    age(tmp_path / "bucket", 1e6)
    for attempt in (a.remote.list, a.remote.collect):
        with pytest.raises(CorruptChunk, match="checksum"):
            attempt()
    assert objects_in(tmp_path / "bucket") == before
