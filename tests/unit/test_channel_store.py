"""The channel-major copy of K: what is added is found and read, from memory or from files."""

import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch

from offload.errors import ClosedError, ConfigError
from offload.tiers.near import channel_file
from offload.tiers.near.channel_store import ChannelStore
from offload.types import ChunkLayout
from tests.support.channels import (
    ALL,
    BLOCK_CHUNKS,
    CHUNK_BYTES,
    LANE,
    LAYOUT,
    TOKEN,
    assert_holds,
    check_against,
    files_of,
    find,
    make_keys,
    make_sums,
    open_store,
    put,
)
from tests.support.disk import WAIT_S

pytestmark = pytest.mark.leaks

BIG_SLOTS = [7, (5 << 32) | 9, 2**63 - 1]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def store(directory: Path) -> Iterator[ChannelStore]:
    with closing(open_store(directory)) as opened:
        yield opened
        opened.check_integrity()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keys_of_any_dtype_are_held_in_memory_and_in_files(
    directory: Path, dtype: torch.dtype
) -> None:
    layout = ChunkLayout(2, 16, 8, 4, dtype)
    with closing(open_store(directory, layout=layout)) as store:
        put(store, range(6), layout=layout)
        assert store.stats()["blocks"] == 1
        assert_holds(store, range(6), layout=layout)


@pytest.mark.parametrize("slots", [[3], [3, 1, 2], BIG_SLOTS])
def test_tail_shorter_than_a_block_stays_in_memory(store: ChannelStore, slots: list[int]) -> None:
    put(store, slots)
    assert store.stats()["tail_bytes"] == len(slots) * CHUNK_BYTES
    assert store.stats()["blocks"] == 0
    check_against(store, dict.fromkeys(slots), unknown=99)


@pytest.mark.parametrize("step", [1, 3, 4, 19, 50])
def test_tail_that_fills_becomes_a_file_however_it_was_added(
    store: ChannelStore, step: int
) -> None:
    for first in range(0, 50, step):
        put(store, range(first, min(50, first + step)))
    stats = store.stats()
    assert stats["blocks"] == 50 // BLOCK_CHUNKS
    assert stats["tail_bytes"] == 50 % BLOCK_CHUNKS * CHUNK_BYTES
    check_against(store, dict.fromkeys(range(50)), unknown=99)


def test_disk_bytes_are_those_of_the_files(store: ChannelStore, directory: Path) -> None:
    put(store, range(9))
    store.flush()
    sizes = [path.stat().st_size for path in directory.iterdir()]
    assert len(sizes) == 3
    assert sum(sizes) == store.stats()["disk_bytes"]


def test_lanes_fill_blocks_of_their_own(store: ChannelStore) -> None:
    put(store, range(6), [(0, 0), (0, 1)] * 3)
    assert store.stats()["blocks"] == 0
    put(store, [6, 7], (0, 1))
    assert store.stats()["blocks"] == 1
    assert [store.find(np.array([slot])).is_file[0] for slot in range(8)] == [
        slot in {1, 3, 5, 6} for slot in range(8)
    ]


def test_slot_that_is_held_is_ignored_when_it_comes_again(store: ChannelStore) -> None:
    put(store, range(5))
    stats = store.stats()
    store.add([4, 0, 4], LANE, torch.stack([make_keys(8)] * 3), np.stack([make_sums(8)] * 3))
    assert store.stats() == stats
    assert_holds(store, range(5))


def test_slot_that_is_twice_in_one_call_is_held_once(store: ChannelStore) -> None:
    put(store, [1, 1, 2, 1])
    check_against(store, {1: None, 2: None}, unknown=99)


@pytest.mark.parametrize(
    "channels",
    [[[0], [0]], [[7], [0]], [[0, 1, 2, 5], [2, 3, 6, 7]], [[6, 1], [0, 5]]],
    ids=["first", "ends", "some", "unordered"],
)
def test_read_brings_just_these_channels_of_each_head(
    store: ChannelStore, channels: list[list[int]]
) -> None:
    put(store, range(11))
    assert_holds(store, [10, 3, 0, 8, 7], np.array(channels))


def test_read_touches_only_blocks_in_which_something_was_found(store: ChannelStore) -> None:
    put(store, range(12))
    found = find(store, [9, 0])
    assert len(found.blocks) == 2
    assert store.read(found, ALL).bytes_read == 2 * 4096
    assert store.meter.fetched == (2 * 4096, 2)
    assert store.read(find(store, []), ALL).addresses.shape == (0, 2, 8)


def test_file_system_without_direct_io_is_read_through_the_page_cache(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_file, "supports_direct_io", lambda _: False)
    with closing(open_store(directory)) as store:
        put(store, range(11))
        assert store.stats()["blocks"] == 2
        assert_holds(store, range(11), np.array([[1, 4], [0, 7]]))


def test_found_chunks_are_readable_after_their_tail_was_written(store: ChannelStore) -> None:
    put(store, [0, 1, 2])
    found = find(store, [0, 1, 2])
    put(store, [3])
    assert store.stats()["tail_bytes"] == 0
    assert_holds(store, [0, 1, 2], found=found)


def test_missing_slots_are_named_by_position(store: ChannelStore) -> None:
    put(store, range(5))
    found = find(store, [50, 3, 51, 4])
    assert found.missing.tolist() == [0, 2]
    assert found.block[[0, 2]].tolist() == [-1, -1]
    assert found.column.tolist() == [0, 3, 0, 0]
    assert not store.has(50)
    assert store.has(3)


def test_known_answer_is_returned_as_long_as_nothing_moves(store: ChannelStore) -> None:
    put(store, range(5))
    known = find(store, range(5))
    assert find(store, range(5), known) is known
    put(store, [5])
    longer = find(store, range(6), known)
    assert len(longer.blocks) == 3
    assert_holds(store, range(6), found=longer)


@pytest.mark.parametrize("slots", [[1, 0, 2], [0, 1], [2], []])
def test_known_answer_to_other_slots_is_not_used(store: ChannelStore, slots: list[int]) -> None:
    put(store, range(3))
    known = find(store, [0, 1, 2])
    assert_holds(store, slots, found=find(store, slots, known))


@pytest.mark.parametrize("change", ["forget", "drop", "fill"])
def test_known_answer_is_not_used_once_something_moved(store: ChannelStore, change: str) -> None:
    put(store, range(6))
    known = find(store, range(6))
    if change == "forget":
        store.forget([0])
    elif change == "drop":
        store.drop(known.blocks[known.block[0]].number)
    else:
        put(store, [6, 7])
    found = find(store, range(6), known)
    lost = {"forget": [0], "drop": [0, 1, 2, 3], "fill": []}[change]
    assert found.missing.tolist() == lost
    put(store, lost or [8])
    assert_holds(store, range(6), found=find(store, range(6), found))


def test_mean_of_values_is_that_of_the_chunks_that_were_found(store: ChannelStore) -> None:
    put(store, [2, 4, 6, 8, 30])
    assert np.allclose(store.means(find(store, [2, 4, 6, 8, 30])), 10)
    assert np.allclose(store.means(find(store, [30, 99])), 30)


def test_mean_of_a_block_counts_in_proportion_where_a_part_of_it_is_asked_for(
    store: ChannelStore,
) -> None:
    put(store, [2, 4, 6, 8, 30])
    means = store.means(find(store, [2, 8, 8, 30]))
    assert means.shape == (2, 4)
    assert np.allclose(means, (3 * 5 + 30) / 4)
    assert not store.means(find(store, [99])).any()


def test_block_is_removed_when_a_third_of_it_is_dead(store: ChannelStore, directory: Path) -> None:
    put(store, range(4))
    store.forget([0, 77])
    check_against(store, dict.fromkeys([1, 2, 3]), unknown=0)
    assert len(files_of(directory)) == 1
    store.forget([2])
    assert files_of(directory) == []
    assert find(store, [1, 3]).missing.tolist() == [0, 1]
    assert store.stats()["dropped"] == 2


def test_forgotten_chunk_of_a_tail_gives_its_memory_back(store: ChannelStore) -> None:
    put(store, range(3))
    store.forget([1])
    assert store.stats()["tail_bytes"] == 2 * CHUNK_BYTES
    put(store, [3, 4])
    assert store.stats()["blocks"] == 1
    check_against(store, dict.fromkeys([0, 2, 3, 4]), unknown=1)


def test_retain_forgets_all_others(store: ChannelStore) -> None:
    put(store, range(10))
    store.retain([0, 1, 2, 9, 77])
    check_against(store, dict.fromkeys([0, 1, 2, 9]), unknown=3)


@pytest.mark.parametrize("memory_chunks", [1, 2, 3, 5])
def test_memory_limit_is_kept_by_writing_the_longest_tail_short(
    directory: Path, memory_chunks: int
) -> None:
    with closing(open_store(directory, memory_chunks=memory_chunks)) as store:
        for slot in range(20):
            put(store, [slot], (0, 1 + (slot % 3 > 0)))
            assert store.stats()["tail_bytes"] <= memory_chunks * CHUNK_BYTES
        assert store.stats()["dropped"] == 0
        check_against(store, dict.fromkeys(range(20)), unknown=99)


def test_memory_limit_writes_the_longest_tail(directory: Path) -> None:
    with closing(open_store(directory, memory_chunks=4)) as store:
        put(store, [0], (0, 0))
        put(store, [1, 2], (0, 1))
        put(store, [3, 4], (0, 2))
        assert [store.find(np.array([slot])).is_file[0] for slot in range(5)] == [
            False,
            True,
            True,
            False,
            False,
        ]


def test_padding_of_a_file_is_zero_whatever_was_written_before(
    store: ChannelStore, directory: Path
) -> None:
    put(store, range(5))
    store.flush()
    codes_bytes = 2 * 8 * 16
    assert not any((directory / files_of(directory)[1]).read_bytes()[4096 + codes_bytes :])


def test_chunk_that_was_forgotten_after_it_was_dropped_is_new_when_it_comes(
    store: ChannelStore,
) -> None:
    put(store, range(4))
    store.drop(find(store, [0]).blocks[0].number)
    store.forget([0])
    put(store, [0, 1])
    assert (store.stats()["dropped"], store.stats()["rebuilt"]) == (4, 1)


def test_flush_writes_every_tail_however_short(store: ChannelStore) -> None:
    put(store, range(7), [(0, slot % 3) for slot in range(7)])
    store.flush()
    assert store.stats()["tail_bytes"] == 0
    assert store.stats()["blocks"] == 3
    assert_holds(store, range(7))


@pytest.mark.parametrize("remove", [False, True])
def test_close_keeps_files_only_if_it_should_and_then_nothing_works(
    directory: Path, remove: bool
) -> None:
    store = open_store(directory)
    put(store, range(6))
    found = find(store, [1])
    store.close(remove=remove)
    store.close(remove=remove)
    assert len(files_of(directory)) == (not remove)
    with pytest.raises(ClosedError):
        put(store, [9])
    with pytest.raises(ClosedError):
        find(store, [1])
    with pytest.raises(ClosedError):
        store.read(found, ALL)
    with pytest.raises(ClosedError):
        store.forget([1])
    with pytest.raises(ClosedError):
        store.flush()


def test_store_of_the_same_token_finds_the_blocks_again(directory: Path) -> None:
    with closing(open_store(directory)) as store:
        put(store, range(10))
    with closing(open_store(directory, token="other")) as other:
        assert other.slots == []
    with closing(open_store(directory)) as again:
        check_against(again, dict.fromkeys(range(8)), unknown=8)
        assert np.allclose(again.means(find(again, range(8))), 3.5)
        put(again, range(20, 24))
        check_against(again, dict.fromkeys([*range(8), *range(20, 24)]), unknown=8)
        again.close(remove=True)
    assert files_of(directory) == []


def test_slot_in_two_blocks_is_found_in_the_later_one(directory: Path) -> None:
    with closing(open_store(directory)) as store:
        put(store, range(4))
        store.forget([2])
        put(store, [2, 5, 6, 7])
    with closing(open_store(directory)) as again:
        found = find(again, [1, 2, 5])
        assert found.block.tolist() == [0, 1, 1]
        again.check_integrity()


def test_threads_that_add_at_once_lose_nothing(directory: Path) -> None:
    barrier = threading.Barrier(4)
    errors: list[BaseException] = []

    def add(number: int, store: ChannelStore) -> None:
        try:
            barrier.wait(WAIT_S)
            for first in range(0, 60, 5):
                # Half of the chunks are added by two threads.
                put(store, range(first + 30 * number, first + 30 * number + 5), (0, number % 2))
                assert store.stats()["tail_bytes"] <= 6 * CHUNK_BYTES
        except BaseException as error:
            errors.append(error)

    with closing(open_store(directory, memory_chunks=6)) as store:
        threads = [threading.Thread(target=add, args=(i, store)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        check_against(store, dict.fromkeys(range(150)), unknown=999)
        store.close(remove=True)
    assert files_of(directory) == []


@pytest.mark.parametrize("token", ["", "a/b", "..", "a b", "x" * 33])
def test_token_that_is_no_name_is_refused(directory: Path, token: str) -> None:
    with pytest.raises(ConfigError, match="1 to 32 letters"):
        open_store(directory, token=token)


@pytest.mark.parametrize(
    ("block_tokens", "memory_bytes"), [(15, 1 << 20), (1 << 30, 1 << 20), (64, CHUNK_BYTES - 1)]
)
def test_numbers_that_hold_no_chunk_are_refused(
    directory: Path, block_tokens: int, memory_bytes: int
) -> None:
    with pytest.raises(ConfigError, match=f"{block_tokens} tokens and {memory_bytes} bytes"):
        ChannelStore(
            directory, LAYOUT, token=TOKEN, block_tokens=block_tokens, memory_bytes=memory_bytes
        )


def test_directory_that_is_a_file_is_refused(directory: Path) -> None:
    directory.write_bytes(b"")
    with pytest.raises(ConfigError, match="cannot use"):
        open_store(directory / "file")
