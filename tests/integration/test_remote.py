"""A cache whose disk is too small for it, with an object store below."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload import OffloadedCache
from offload.errors import CapacityError, ConfigError
from tests.support.s3_server import BUCKET, s3_server
from tests.support.sessions import small_store
from tests.support.small_caches import (
    CAPACITY,
    CHUNK_TOKENS,
    check_sound,
    draw_ids,
    expected_tokens,
    generate,
    make_llama,
)

TIERS = ("gpu", "cpu", "disk", "remote")
RECORD_BYTES = 2 * 4096
SMALL = {**CAPACITY, "disk": 5 * RECORD_BYTES, "remote": 200 * RECORD_BYTES}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with s3_server() as port:
        yield port


@pytest.fixture
def s3(port: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """Return a URL that needs nothing but the environment, as users have it."""
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
        "AWS_SECRET_ACCESS_KEY": "secret",
    }.items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/caches"


def open_cache(folder: Path, url: str, **changes: Any) -> OffloadedCache:
    arguments: dict[str, Any] = {"capacity": SMALL, "chunk_tokens": CHUNK_TOKENS, **changes}
    return OffloadedCache(TIERS, disk_path=folder / "disk", remote_url=url, **arguments)


def objects(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_generate_over_s3_gives_the_same_tokens_as_without_offload(tmp_path: Path, s3: str) -> None:
    ids = draw_ids(2, 90)
    with open_cache(tmp_path, s3) as cache:
        tokens = generate(cache, ids)
        cache.flush()
        stats = cache.stats().tiers
        check_sound(cache, tokens.shape[1] - 1)
    assert torch.equal(tokens, expected_tokens(ids))
    assert stats["remote"].num_chunks > 5
    assert stats["remote"].loaded_bytes > 0
    for name in TIERS:
        assert stats[name].used_bytes <= stats[name].peak_bytes <= stats[name].capacity_bytes


@pytest.mark.parametrize("policy", ["exact", "adaptive", "streaming"])
@pytest.mark.parametrize("batch", [1, 2])
def test_generate_over_a_folder_gives_the_same_tokens_as_with_a_larger_disk(
    tmp_path: Path, policy: str, batch: int
) -> None:
    ids = draw_ids(batch, 90)
    with OffloadedCache(
        TIERS[:3],
        capacity=CAPACITY,
        disk_path=tmp_path / "large",
        chunk_tokens=CHUNK_TOKENS,
        policy=policy,
    ) as cache:
        expected = generate(cache, ids)
    with open_cache(tmp_path, (tmp_path / "bucket").as_uri(), policy=policy) as cache:
        assert torch.equal(generate(cache, ids), expected)
        cache.flush()
        stats = cache.stats().tiers
        assert stats["remote"].num_chunks == len(objects(tmp_path / "bucket")) > 0
    assert objects(tmp_path / "bucket") == []


def test_chunks_of_a_reset_cache_leave_the_store(tmp_path: Path) -> None:
    with open_cache(tmp_path, (tmp_path / "bucket").as_uri()) as cache:
        generate(cache, draw_ids(1, 120))
        cache.flush()
        assert objects(tmp_path / "bucket")
        cache.reset()
        assert objects(tmp_path / "bucket") == []


def test_cache_that_outgrows_the_store_as_well_raises_and_stays_usable(tmp_path: Path) -> None:
    capacity = {**SMALL, "remote": 2 * RECORD_BYTES}
    with open_cache(tmp_path, (tmp_path / "bucket").as_uri(), capacity=capacity) as cache:
        with pytest.raises(CapacityError, match="no room"):
            generate(cache, draw_ids(1, 300))
        cache.reset()
        ids = draw_ids(1, 40)
        assert torch.equal(generate(cache, ids), expected_tokens(ids))


def test_fork_shares_remote_chunks_and_closing_it_keeps_them(tmp_path: Path) -> None:
    ids = draw_ids(1, 120)
    with open_cache(tmp_path, (tmp_path / "bucket").as_uri()) as cache:
        tokens = generate(cache, ids)
        cache.flush()
        before = len(objects(tmp_path / "bucket"))
        with cache.fork() as fork:
            more = torch.cat([tokens, draw_ids(1, 5, 7)], 1)
            found = generate(fork, more, 4)
        assert torch.equal(found, generate(cache, more, 4))
        assert len(objects(tmp_path / "bucket")) >= before > 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tiers": ["gpu", "cpu", "disk", "remote"]}, "needs remote_url"),
        ({"tiers": ["gpu", "remote"], "remote_url": "memory:///"}, "'disk' has no room"),
        ({"tiers": ["gpu", "disk"], "remote_url": "memory:///"}, "needs the tier 'remote'"),
        (
            {"tiers": ["disk", "remote"], "remote_url": "gopher://user:secret@host/x"},
            r"^'gopher://host/x' is no object store",
        ),
        (
            {"tiers": ["disk", "remote"], "remote_url": "memory:///", "policy": "instinfer"},
            "not beside 'remote'",
        ),
    ],
    ids=["no_url", "no_disk", "no_tier", "scheme", "near"],
)
def test_remote_tier_asked_for_wrongly_is_refused_before_any_work(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        OffloadedCache(**changes)


def test_session_saved_from_the_store_is_loaded_above_it_and_continues(tmp_path: Path) -> None:
    url, ids = (tmp_path / "bucket").as_uri(), draw_ids(1, 120)
    with small_store(tmp_path / "root") as store:
        with open_cache(tmp_path, url) as cache:
            tokens = generate(cache, ids)
            cache.save("s", store=store, model=make_llama(), token_ids=tokens)
            stats = cache.stats().tiers
            assert stats["remote"].used_bytes == 0  # read from the root from now on
            more = torch.cat([tokens, draw_ids(1, 60, 7)], 1)
            expected = generate(cache, more)
        with OffloadedCache.load(
            "s",
            make_llama(),
            store=store,
            tiers=TIERS,
            capacity=SMALL,
            disk_path=tmp_path / "disk",
            remote_url=url,
        ) as cache:
            assert torch.equal(generate(cache, more), expected)
            cache.flush()
            check_sound(cache, expected.shape[1] - 1)
            assert cache.stats().tiers["remote"].num_chunks > 0
