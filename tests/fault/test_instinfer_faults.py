"""A cache whose workers die, hang, or find their disk full or damaged while a model generates."""

import resource
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from offload import CorruptChunk, DiskFull, OffloadedCache
from offload.presets import Preset
from offload.tiers.near.link import WorkerLink
from offload.types import PAGE_BYTES
from tests.support.near import flip, hang, held_launcher, kill, num_restarts
from tests.support.near_caches import DENSE, AtStep, generate, near, open_small
from tests.support.small_caches import (
    check_continues,
    check_sound,
    draw_ids,
    expected_tokens,
    plain_after,
    step,
)


@pytest.fixture(scope="module", autouse=True)
def _launcher() -> Iterator[None]:
    with held_launcher():
        yield


def fail(cache: OffloadedCache, member: int, how: Callable[[WorkerLink], None]) -> None:
    how(near(cache).members[member].link)


@pytest.mark.parametrize("policy", [DENSE, "instinfer"], ids=["dense", "sparf"])
def test_workers_that_die_and_hang_amid_of_generate_change_no_token(
    tmp_path: Path, policy: str | Preset
) -> None:
    ids, tokens = draw_ids(2, 90), []
    for has_faults in (False, True):
        with open_small(tmp_path, policy) as cache:
            steps = [AtStep(1, cache.flush)]  # from when on workers attend to what they have
            if has_faults:
                steps.append(AtStep(3, partial(fail, cache, 0, kill)))
                steps.append(AtStep(6, partial(fail, cache, 1, hang)))
            tokens.append(generate(cache, ids, 10, *steps))
            assert num_restarts(near(cache)) == [int(has_faults)] * 2
            check_sound(cache, 90 + 9)
    assert torch.equal(*tokens)
    if policy is DENSE:
        assert torch.equal(tokens[0], expected_tokens(ids, 10))


def test_disk_that_fills_up_amid_of_generate_raises_and_every_chunk_can_be_read(
    tmp_path: Path,
) -> None:
    ids = draw_ids(1, 100)
    with open_small(tmp_path) as cache:

        def fill_up() -> None:
            """Let no file of one worker grow."""
            cache.flush()
            pid = near(cache).members[1].link.pid
            folder = near(cache).members[1].link.config.directory
            largest = max(path.stat().st_size for path in folder.iterdir())
            limits.append((pid, resource.prlimit(pid, resource.RLIMIT_FSIZE)))
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (largest, limits[0][1][1]))

        limits: list[tuple[int, tuple[int, int]]] = []
        with pytest.raises(
            DiskFull,
            match=r"\d+ chunks are held in write buffers because no faster tier has room; "
            r"free slots: gpu 0 of \d+, disk \d+ of \d+",
        ):
            generate(cache, ids, 100, AtStep(2, fill_up))
        length = cache.get_seq_length()
        assert 100 < length < 199
        check_sound(cache, length)
        resource.prlimit(limits[0][0], resource.RLIMIT_FSIZE, limits[0][1])
        cache.flush()
        check_sound(cache, length)
        cache.crop(100 - length)
        check_continues(cache, plain_after(ids))
        assert num_restarts(near(cache)) == [0, 0]


def test_damaged_records_raise_in_the_step_that_needs_them_and_the_step_is_undone(
    tmp_path: Path,
) -> None:
    ids = draw_ids(1, 100)
    with open_small(tmp_path) as cache:
        step(cache, ids)
        cache.flush()
        paths = list((tmp_path / "a").rglob("*.kvseg"))
        for path in paths:
            flip(path, range(PAGE_BYTES, path.stat().st_size, 512))
        with pytest.raises(CorruptChunk, match=r"chunk \d+"):
            step(cache, draw_ids(1, 1, seed=3))
        check_sound(cache, 100)
        for path in paths:
            flip(path, range(PAGE_BYTES, path.stat().st_size, 512))
        check_continues(cache, plain_after(ids))
