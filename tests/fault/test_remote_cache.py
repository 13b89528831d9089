"""A cache whose object store fails in the middle of a step."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offload import OffloadedCache
from offload.errors import CorruptChunk, StorageError
from tests.support.faulty_proxy import FaultyProxy, faulty_proxy
from tests.support.remote import s3_bucket
from tests.support.s3_server import BUCKET, s3_server
from tests.support.small_caches import (
    CAPACITY,
    CHUNK_TOKENS,
    check_continues,
    check_sound,
    draw_ids,
    plain_after,
    step,
)

RECORD_BYTES = 2 * 4096
SMALL = {**CAPACITY, "disk": 5 * RECORD_BYTES, "remote": 200 * RECORD_BYTES}
FIRST, SECOND = draw_ids(1, 90), draw_ids(1, 60, 2)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as port:
        s3_bucket(port, "warm").list("nothing")  # starts obstore's threads, for all tests
        yield port


@pytest.fixture
def proxy(port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    with faulty_proxy(port) as (proxy, proxy_port):
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy_port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
            "AWS_SECRET_ACCESS_KEY": "secret",
        }.items():
            monkeypatch.setenv(name, value)
        yield proxy
        proxy.relent()


@pytest.fixture
def cache(tmp_path: Path, proxy: FaultyProxy) -> Iterator[OffloadedCache]:
    with OffloadedCache(
        ["gpu", "cpu", "disk", "remote"],
        capacity=SMALL,
        disk_path=tmp_path / "disk",
        remote_url=f"s3://{BUCKET}/caches",
        chunk_tokens=CHUNK_TOKENS,
    ) as cache:
        step(cache, FIRST)
        cache.flush()
        yield cache
        proxy.relent()


def test_step_whose_stores_are_refused_is_undone_and_can_be_repeated(
    cache: OffloadedCache, proxy: FaultyProxy
) -> None:
    def store_all() -> None:
        step(cache, SECOND)
        cache.flush()

    proxy.strike("expired", 10_000, "PUT")
    with pytest.raises(StorageError, match="credentials have expired"):
        store_all()
    proxy.relent()
    if cache.get_seq_length() == FIRST.shape[1]:  # else only the flush has met the refusal
        step(cache, SECOND)
    cache.flush()
    check_sound(cache, FIRST.shape[1] + SECOND.shape[1])
    check_continues(cache, plain_after(FIRST, SECOND))


@pytest.mark.parametrize(
    ("fault", "times", "error"), [("denied", 1, StorageError), ("flip", 2, CorruptChunk)]
)
def test_step_whose_loads_fail_is_undone_and_can_be_repeated(
    cache: OffloadedCache,
    proxy: FaultyProxy,
    fault: str,
    times: int,
    error: type[Exception],
) -> None:
    proxy.strike(fault, times, "/000000000000")  # a read, and one again of what is damaged
    with pytest.raises(error):
        step(cache, SECOND)
    check_sound(cache, FIRST.shape[1])
    assert torch.isfinite(step(cache, SECOND)).all()
    check_continues(cache, plain_after(FIRST, SECOND))


def test_generation_through_a_burst_of_throttling_gives_the_same_tokens(
    cache: OffloadedCache, proxy: FaultyProxy
) -> None:
    proxy.strike("slow down", 3)
    proxy.strike("cut", 3, "GET")
    step(cache, SECOND)
    check_continues(cache, plain_after(FIRST, SECOND))
