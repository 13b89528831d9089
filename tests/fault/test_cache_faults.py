"""An ``OffloadedCache`` under a real model when something fails: undone, named, usable again."""

import errno
import functools
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload import (
    CapacityError,
    ConfigError,
    CorruptChunk,
    DiskFull,
    OffloadedCache,
    StorageError,
    TransferTimeout,
)
from offload.tiers.disk import DiskTier
from offload.tiers.faults import FaultPlan
from tests.support.disk import FlakyCall, Gate, fail_with
from tests.support.full_disks import file_size_limit, small_file_system
from tests.support.small_caches import (
    CAPACITY,
    CHUNK_TOKENS,
    SLOT_BYTES,
    check_continues,
    check_nothing_left,
    check_sound,
    decode,
    draw_ids,
    expected_tokens,
    generate,
    make_cache,
    plain_after,
    step,
)

PIECE_TOKENS = 2 * CHUNK_TOKENS
_HELD = (
    r"\d+ chunks are held in write buffers because no faster tier has room; "
    r"free slots: gpu 0 of \d+, cpu 0 of \d+, disk \d+ of \d+"
)


def break_disk(patch: pytest.MonkeyPatch, **calls: Any) -> None:
    """Give the disk tiers of caches made from now on other system calls."""
    patch.setattr("offload.engine.DiskTier", functools.partial(DiskTier, **calls))


def prefill(cache: OffloadedCache, ids: Tensor) -> None:
    """Feed what the cache does not have yet, in pieces."""
    while cache.get_seq_length() < ids.shape[1]:
        start = cache.get_seq_length()
        step(cache, ids[:, start : start + PIECE_TOKENS])


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open()


def test_generate_beyond_every_capacity_names_bytes_and_goes_on_when_there_is_room(
    tmp_path: Path,
) -> None:
    capacity = {"gpu": 14 * SLOT_BYTES, "cpu": 3 * SLOT_BYTES, "disk": 8 * SLOT_BYTES}
    ids = draw_ids(1, 24)
    with make_cache(tmp_path, capacity=capacity) as cache:
        step(cache, ids)
        with pytest.raises(CapacityError, match=rf"chunks of {SLOT_BYTES} bytes"):
            step(cache, draw_ids(1, 200, seed=2))
        check_sound(cache, 24)
        check_continues(cache, plain_after(ids))
        check_sound(cache, 24 + 12)


def test_decoding_until_the_tiers_are_full_keeps_every_layer_at_the_same_length(
    tmp_path: Path,
) -> None:
    capacity = {"gpu": 13 * SLOT_BYTES, "cpu": 3 * SLOT_BYTES, "disk": 4 * SLOT_BYTES}
    ids = draw_ids(1, 200)
    with make_cache(tmp_path, capacity=capacity) as cache:
        with pytest.raises(CapacityError):
            decode(cache, ids)
        reached = cache.get_seq_length()
        assert reached >= 3 * CHUNK_TOKENS
        check_sound(cache, reached)
        cache.crop(-CHUNK_TOKENS - 3)
        check_continues(cache, plain_after(ids[:, : reached - CHUNK_TOKENS - 3]), num_new=4)


def test_first_prompt_that_does_not_fit_leaves_the_cache_free_for_another_batch(
    tmp_path: Path,
) -> None:
    capacity = {"gpu": 60 * SLOT_BYTES, "cpu": 3 * SLOT_BYTES, "disk": 8 * SLOT_BYTES}
    with make_cache(tmp_path, capacity=capacity) as cache:
        with pytest.raises(CapacityError):
            step(cache, draw_ids(4, 200))
        ids = draw_ids(2, 16)
        assert torch.equal(generate(cache, ids), expected_tokens(ids))


def test_device_too_small_for_one_layer_names_both_numbers(tmp_path: Path) -> None:
    capacity = {**CAPACITY, "gpu": 2 * SLOT_BYTES}
    with make_cache(tmp_path, capacity=capacity) as cache:
        with pytest.raises(CapacityError, match=r"gpu capacity 8192 bytes.* make \d+"):
            step(cache, draw_ids(1, 8))
        assert cache.get_seq_length() == 0
    check_nothing_left(tmp_path / "disk")


@pytest.mark.parametrize(
    ("code", "error"), [(errno.ENOSPC, DiskFull), (errno.EIO, StorageError)], ids=["full", "broken"]
)
def test_disk_that_refuses_writes_raises_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[StorageError]
) -> None:
    pwritev = FlakyCall(os.pwritev, fail_with(code), armed=False)
    break_disk(monkeypatch, pwritev=pwritev)
    ids = draw_ids(2, 40)
    with make_cache(tmp_path) as cache:
        step(cache, ids)
        cache.flush()
        pwritev.armed = True
        with pytest.raises(error, match=_HELD) as caught:
            step(cache, draw_ids(2, 60, seed=2))
        assert caught.value.errno == code
        check_sound(cache, 40)
        pwritev.armed = False
        check_continues(cache, plain_after(ids))
    check_nothing_left(tmp_path / "disk")


def test_prefill_on_a_full_disk_goes_on_while_memory_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of 9 slots on the device and 3 on the host the first layer has a share of 4 and 1: one of its
    # chunks goes to the disk, before anybody knows that the other layer will leave a slot free.
    capacity = {**CAPACITY, "cpu": 5 * SLOT_BYTES}
    break_disk(monkeypatch, pwritev=FlakyCall(os.pwritev, fail_with(errno.ENOSPC)))
    ids = draw_ids(1, 6 * CHUNK_TOKENS + 4)
    with make_cache(tmp_path, capacity=capacity) as cache:
        step(cache, ids)
        cache.flush()
        stats = cache.stats()
        assert (stats.failed_stores, stats.rescued_chunks) == (1, 1)
        assert stats.tiers["disk"].num_chunks == 0
        check_sound(cache, 6 * CHUNK_TOKENS + 4)
        check_continues(cache, plain_after(ids), num_new=4)


def test_prefill_in_pieces_on_a_full_disk_stops_with_disk_full_and_goes_on_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwritev = FlakyCall(os.pwritev, fail_with(errno.ENOSPC))
    break_disk(monkeypatch, pwritev=pwritev)
    ids = draw_ids(1, 240)
    with make_cache(tmp_path) as cache:
        with pytest.raises(DiskFull, match=_HELD):
            prefill(cache, ids)
        length = cache.get_seq_length()
        assert length >= 3 * CHUNK_TOKENS
        check_sound(cache, length)
        pwritev.armed = False
        prefill(cache, ids)
        cache.flush()
        check_sound(cache, 240)
        check_continues(cache, plain_after(ids), num_new=4)
    check_nothing_left(tmp_path / "disk")


def test_prefill_beyond_a_file_size_limit_stops_with_disk_full_and_goes_on_without_it(
    tmp_path: Path,
) -> None:
    ids = draw_ids(1, 240)
    with make_cache(tmp_path) as cache:
        with file_size_limit(7 * 2 * SLOT_BYTES + 100), pytest.raises(DiskFull) as caught:
            prefill(cache, ids)
        assert caught.value.errno == errno.EFBIG
        length = cache.get_seq_length()
        check_sound(cache, length)
        assert length >= 10 * CHUNK_TOKENS
        prefill(cache, ids)
        check_sound(cache, 240)
        check_continues(cache, plain_after(ids), num_new=4)


def test_prefill_on_a_real_full_file_system_stops_with_disk_full_and_every_chunk_is_readable(
    tmp_path: Path,
) -> None:
    ids = draw_ids(1, 240)
    # 10 records, and what a tmpfs takes for folders and locks.
    with small_file_system(tmp_path / "disk", 22 * SLOT_BYTES), make_cache(tmp_path) as cache:
        with pytest.raises(DiskFull) as caught:
            prefill(cache, ids)
        assert caught.value.errno == errno.ENOSPC
        length = cache.get_seq_length()
        check_sound(cache, length)
        assert length >= 5 * CHUNK_TOKENS
        plain = plain_after(*ids[:, :length].split(PIECE_TOKENS, 1))
        for (keys, values, _), (plain_keys, plain_values, _) in zip(cache, plain, strict=True):
            assert keys is not None
            assert values is not None
            assert torch.allclose(keys, plain_keys, atol=1e-5)
            assert torch.allclose(values, plain_values, atol=1e-5)


def test_store_that_fails_after_its_step_is_named_by_the_next_flush_and_made_up_for_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    def wait_and_fail(*_: object) -> None:
        gate()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    pwritev = FlakyCall(os.pwritev, wait_and_fail, armed=False)
    break_disk(monkeypatch, pwritev=pwritev)
    ids, more = draw_ids(1, 80), draw_ids(1, CHUNK_TOKENS, seed=2)
    with make_cache(tmp_path) as cache:
        step(cache, ids)
        cache.flush()
        pwritev.armed = True
        step(cache, more)
        gate.open()
        with pytest.raises(StorageError, match=_HELD):
            cache.flush()
        check_sound(cache, 80 + CHUNK_TOKENS)
        pwritev.armed = False
        cache.flush()
        assert cache.stats().num_chunks == sum(
            tier.num_chunks for tier in cache.stats().tiers.values()
        )
        check_continues(cache, plain_after(ids, more), num_new=4)


def test_cache_whose_config_asks_for_damage_raises_and_never_answers_wrong(
    tmp_path: Path,
) -> None:
    ids = draw_ids(1, 90)
    with make_cache(tmp_path) as cache:
        cache._core.config = replace(cache._core.config, faults=FaultPlan(flip=1.0))
        step(cache, ids)
        cache.flush()
        with pytest.raises(CorruptChunk):
            decode(cache, draw_ids(1, 3, seed=2))
        check_sound(cache, cache.get_seq_length())
        cache._core.config = replace(cache._core.config, faults=None)
        cache.reset()
        assert torch.equal(generate(cache, ids), expected_tokens(ids))


def damage(folder: Path, how: str) -> None:
    """Change every record on disk, or cut every file."""
    paths = list(folder.rglob("*.kvseg"))
    assert paths
    for path in paths:
        size = path.stat().st_size
        with path.open("r+b") as file:
            if how == "truncated":
                file.truncate(size // 2)
                continue
            for offset in range(4096, size, 2 * SLOT_BYTES):
                file.seek(offset)
                file.write(bytes(byte ^ 0x10 for byte in os.pread(file.fileno(), 1, offset)))


@pytest.mark.parametrize("how", ["flipped", "truncated"])
def test_damaged_record_raises_in_the_next_step_and_the_step_is_undone(
    tmp_path: Path, how: str
) -> None:
    ids = draw_ids(1, 90)
    with make_cache(tmp_path) as cache:
        step(cache, ids)
        cache.flush()
        damage(tmp_path / "disk", how)
        with pytest.raises(CorruptChunk):
            decode(cache, draw_ids(1, 3, seed=2))  # what was loaded ahead lasts for a step
        length = cache.get_seq_length()
        assert 90 <= length < 93
        check_sound(cache, length)
        with pytest.raises(CorruptChunk):
            step(cache, draw_ids(1, 1, seed=3))
        check_sound(cache, length)
        cache.reset()
        assert torch.equal(generate(cache, ids), expected_tokens(ids))
    check_nothing_left(tmp_path / "disk")


def test_disk_that_hangs_makes_a_step_miss_its_deadline_and_is_forgiven_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gate: Gate
) -> None:
    preadv = FlakyCall(os.preadv, gate, armed=False)
    break_disk(monkeypatch, preadv=preadv)
    ids, more = draw_ids(1, 90), draw_ids(1, 3, seed=2)
    with make_cache(tmp_path) as cache:
        cache._core.config = replace(cache._core.config, deadline_s=0.5)
        step(cache, ids)
        cache.flush()
        preadv.armed = True
        with pytest.raises(TransferTimeout, match=r"load of \d+ chunks of layer \d from token \d+"):
            decode(cache, more)  # what was loaded ahead lasts for a step
        length = cache.get_seq_length()
        check_sound(cache, length)
        gate.open()
        preadv.armed = False
        check_continues(cache, plain_after(torch.cat([ids, more[:, : length - 90]], 1)), num_new=3)


@pytest.mark.parametrize(
    ("shape", "dtype", "named"),
    [
        ((1, 2, 1, 8), torch.float64, "torch.float64"),
        ((3, 2, 1, 8), torch.float32, r"\(3, 2, 8, 8\)"),
        ((1, 4, 1, 8), torch.float32, r"\(1, 4, 8, 8\)"),
        ((1, 2, 1, 16), torch.float32, r"\(1, 2, 16, 16\)"),
    ],
    ids=["dtype", "batch", "heads", "head_dim"],
)
@pytest.mark.parametrize("layer", [0, 1])
def test_states_that_do_not_continue_the_cache_are_refused(
    tmp_path: Path, shape: tuple[int, ...], dtype: torch.dtype, named: str, layer: int
) -> None:
    ids = draw_ids(1, 30)
    with make_cache(tmp_path) as cache:
        step(cache, ids)
        with pytest.raises(ConfigError, match=f"layer {layer} got .*{named}"):
            cache.update(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), layer)
        check_sound(cache, 30)
        check_continues(cache, plain_after(ids))


def test_interrupted_step_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = draw_ids(1, 40)
    with make_cache(tmp_path) as cache:
        step(cache, ids)
        with monkeypatch.context() as patch:
            attend = cache._core.runtime.attend  # type: ignore[union-attr]

            def interrupt(layer: int, *args: Any) -> Tensor:
                if layer == 1:
                    raise KeyboardInterrupt
                return attend(layer, *args)

            patch.setattr(cache._core.runtime, "attend", interrupt)
            with pytest.raises(KeyboardInterrupt):
                step(cache, draw_ids(1, 1))
        check_sound(cache, 40)
        check_continues(cache, plain_after(ids))
