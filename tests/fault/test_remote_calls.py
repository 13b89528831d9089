"""What networks and object stores do to single calls: what is tried again, and what is not."""

import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from offload.errors import ClosedError, ConfigError, CorruptChunk, OffloadError, StorageError
from offload.tiers.base import Tier
from offload.tiers.remote_bucket import Bucket
from tests.contracts.tier_contract import WAIT_S, WHOLE_PAGES, make_buffers, make_infos, same_chunks
from tests.support.faulty_proxy import FaultyProxy, faulty_proxy
from tests.support.remote import StillClock, make_remote_tier, s3_bucket
from tests.support.s3_server import s3_options, s3_server


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as port:
        s3_bucket(port, "warm").list("nothing")  # starts obstore's threads, for all tests
        yield port


@pytest.fixture
def proxied(port: int) -> Iterator[tuple[FaultyProxy, int]]:
    with faulty_proxy(port) as both:
        yield both


def open_bucket(
    proxied: tuple[FaultyProxy, int], clock: StillClock | None = None, **patience: Any
) -> Bucket:
    return s3_bucket(proxied[1], uuid.uuid4().hex, clock, **patience)


@pytest.mark.parametrize("fault", ["slow down", "internal error", "cut", "lost"])
def test_call_that_fails_for_a_while_is_repeated_until_it_works(
    proxied: tuple[FaultyProxy, int], fault: str
) -> None:
    clock = StillClock()
    bucket = open_bucket(proxied, clock)
    content = bytes(range(256)) * 40
    proxied[0].strike(fault, 3, "PUT")
    bucket.create("a/b", content)
    proxied[0].strike(fault, 3, "GET")
    assert bucket.get("a/b") == content
    proxied[0].strike(fault, 2, "GET")
    assert bucket.get_range("a/b", 100, 1000) == content[100:1100]
    proxied[0].strike(fault, 2, "GET")
    assert [found.num_bytes for found in bucket.list("a")] == [len(content)]
    proxied[0].strike(fault, 2, "POST")
    bucket.delete(["a/b"])
    assert bucket.find("a/b") is None
    assert 9 <= len(clock.pauses) <= 12


def test_pauses_are_random_grow_and_stay_below_the_most(proxied: tuple[FaultyProxy, int]) -> None:
    clock = StillClock()
    bucket = open_bucket(proxied, clock, deadline_s=1e6, first_s=0.1, most_s=2.0)
    proxied[0].strike("slow down", 40, "PUT")
    bucket.create("a", b"content")
    assert len(set(clock.pauses)) == 40
    assert clock.pauses[0] <= 0.1
    assert 1.0 < max(clock.pauses) <= 2.0


def test_store_that_never_recovers_is_given_up_at_the_deadline(
    proxied: tuple[FaultyProxy, int],
) -> None:
    clock = StillClock()
    bucket = open_bucket(proxied, clock, deadline_s=20.0)
    proxied[0].strike("slow down", 10_000)
    with pytest.raises(StorageError, match=r"given up after \d+ tries.*status 503 SlowDown"):
        bucket.get("a")
    assert 10.0 < clock.now_s - 1000.0 <= 20.0


def test_store_that_hangs_costs_one_request_time_a_try(proxied: tuple[FaultyProxy, int]) -> None:
    bucket = open_bucket(proxied, request_s=0.2)
    bucket.create("a", b"content")
    proxied[0].strike("hang", 2, "GET")
    assert bucket.get("a") == b"content"


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("expired", "credentials have expired.*status 403 ExpiredToken"),
        ("skewed", "clocks of this machine and of the store differ"),
        ("denied", "credentials do not allow it.*AccessDenied"),
    ],
)
def test_refusal_that_will_not_pass_is_an_error_at_once_and_shows_no_secret(
    proxied: tuple[FaultyProxy, int], fault: str, words: str
) -> None:
    clock = StillClock()
    bucket = open_bucket(proxied, clock)
    proxied[0].strike(fault, 1)
    with pytest.raises(StorageError, match=words) as caught:
        bucket.create("a", b"content")
    assert clock.pauses == []
    assert "AKIA" not in str(caught.value)
    assert "secret" not in str(caught.value)
    assert str(caught.value).count(f"{bucket.url}/a") == 1


def test_conflict_of_conditional_writes_is_not_taken_for_an_object(
    proxied: tuple[FaultyProxy, int],
) -> None:
    bucket = open_bucket(proxied)
    proxied[0].strike("conflict", 2, "PUT")
    assert bucket.create("a", b"content")
    assert bucket.get("a") == b"content"


def test_write_whose_answer_is_lost_is_there_once_and_whole(
    proxied: tuple[FaultyProxy, int],
) -> None:
    bucket = open_bucket(proxied)
    proxied[0].strike("lost", 1, "PUT")
    assert not bucket.create("a", b"content")  # by the first try
    assert bucket.get("a") == b"content"


def test_object_that_is_missing_or_short_is_corrupt_and_not_asked_for_again(
    proxied: tuple[FaultyProxy, int],
) -> None:
    clock = StillClock()
    bucket = open_bucket(proxied, clock)
    bucket.create("a", b"0123456789")
    for start, num_bytes in ((5, 6), (20, 5)):
        with pytest.raises(CorruptChunk, match="ends"):
            bucket.get_range("a", start, num_bytes)
    with pytest.raises(CorruptChunk, match="no such object"):
        bucket.get("b")
    assert clock.pauses == []


def test_bucket_that_does_not_exist_is_a_wrong_setting(port: int) -> None:
    bucket = Bucket("s3://elsewhere/x", options=s3_options(port))
    with pytest.raises(ConfigError, match=r"no such bucket.*NoSuchBucket"):
        bucket.create("a", b"content")


def test_close_ends_a_call_that_waits_for_its_next_try(proxied: tuple[FaultyProxy, int]) -> None:
    bucket = Bucket("s3://bucket/closing", options=s3_options(proxied[1]))
    proxied[0].strike("slow down", 10_000)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(bucket.get, "a")
        while len(proxied[0].requests) < 2:
            assert not waiting.done()
        bucket.close()
        with pytest.raises(ClosedError):
            waiting.result(WAIT_S)


def test_eight_writers_of_one_name_make_one_object_and_one_winner(port: int) -> None:
    start, prefix = threading.Barrier(8), uuid.uuid4().hex

    def write(number: int) -> bool:
        bucket = s3_bucket(port, prefix)
        start.wait(WAIT_S)
        return bucket.create("a", f"writer {number}".encode())

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(write, range(8)))
    assert won.count(True) == 1
    assert s3_bucket(port, prefix).get("a") == f"writer {won.index(True)}".encode()


@pytest.fixture
def tier(proxied: tuple[FaultyProxy, int]) -> Iterator[Tier]:
    tier = make_remote_tier(open_bucket(proxied, request_s=2.0), 16, WHOLE_PAGES)
    yield tier
    proxied[0].relent()
    tier.close()


@pytest.mark.parametrize("fault", ["slow down", "internal error", "cut", "lost"])
def test_tier_under_a_burst_of_faults_loses_nothing(
    proxied: tuple[FaultyProxy, int], tier: Tier, fault: str
) -> None:
    source, out = make_buffers(8, WHOLE_PAGES, 3), make_buffers(8, WHOLE_PAGES)
    slots = tier.allocate(8)
    proxied[0].strike(fault, 12, "PUT")
    tier.write(slots, make_infos(8), source).wait(WAIT_S)
    proxied[0].strike(fault, 12, "GET")
    tier.read(slots, make_infos(8), out).wait(WAIT_S)
    assert same_chunks(out, source, WHOLE_PAGES)


def test_bit_that_flips_on_the_way_is_noticed_and_read_again(
    proxied: tuple[FaultyProxy, int], tier: Tier
) -> None:
    source, out = make_buffers(1, WHOLE_PAGES, 3), make_buffers(1, WHOLE_PAGES)
    slots = tier.allocate(1)
    tier.write(slots, make_infos(1), source).wait(WAIT_S)
    proxied[0].strike("flip", 1, "GET")
    tier.read(slots, make_infos(1), out).wait(WAIT_S)
    assert same_chunks(out, source, WHOLE_PAGES)
    proxied[0].strike("flip", 2, "GET")
    with pytest.raises(CorruptChunk, match="the header says"):
        tier.read(slots, make_infos(1), out).wait(WAIT_S)


def test_write_that_fails_keeps_slots_and_can_be_repeated(
    proxied: tuple[FaultyProxy, int], tier: Tier
) -> None:
    source, out = make_buffers(4, WHOLE_PAGES, 3), make_buffers(4, WHOLE_PAGES)
    slots = tier.allocate(4)
    proxied[0].strike("expired", 1, "PUT")
    with pytest.raises(StorageError, match="expired"):
        tier.write(slots, make_infos(4), source).wait(WAIT_S)
    assert tier.num_free == 12
    tier.check_integrity()
    tier.write(slots, make_infos(4), source).wait(WAIT_S)
    tier.read(slots, make_infos(4), out).wait(WAIT_S)
    assert same_chunks(out, source, WHOLE_PAGES)


def test_objects_that_cannot_be_removed_now_are_removed_at_close(
    proxied: tuple[FaultyProxy, int],
) -> None:
    bucket = open_bucket(proxied)
    tier = make_remote_tier(bucket, 4, WHOLE_PAGES)
    slots = tier.allocate(4)
    tier.write(slots, make_infos(4), make_buffers(4, WHOLE_PAGES, 1)).wait(WAIT_S)
    proxied[0].strike("denied", 1, "POST")
    tier.free(slots[:2])
    tier.read(slots[2:], make_infos(4)[2:], make_buffers(2, WHOLE_PAGES)).wait(WAIT_S)
    tier.close()
    assert tier.num_left_behind == 2
    assert s3_bucket(proxied[1], bucket.url.rpartition("/")[2]).list("scratch") == []


@pytest.mark.parametrize("url", ["s3://", "nonsense", "gopher://a/b", "s3:///x"])
def test_url_of_no_store_is_refused(url: str) -> None:
    with pytest.raises(OffloadError, match="is no object store"):
        Bucket(url)
