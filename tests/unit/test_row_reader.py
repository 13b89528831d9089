"""Rows of tokens: found where they lie, read when they must be, kept in lines."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from offload.sparse.row_keys import RowKeys
from offload.sparse.row_places import tier_rows
from offload.sparse.row_wanted import Wanted
from offload.tiers.memory import MemoryTier
from offload.types import ChunkId
from tests.support.disk import FlakyCall, Gate
from tests.support.rows import HEADS, OWNER, ROW_BYTES, open_shelf, row_at, tokens
from tests.support.stores import LAYOUT, put

SIZE = LAYOUT.chunk_tokens
ALL = np.stack([np.random.default_rng(head).permutation(6 * SIZE) for head in HEADS])
"""All tokens of six chunks, in another order for each head."""


@pytest.mark.parametrize("memory_chunks", [0, 2, 6], ids=["on_disk", "mixed", "in_memory"])
@pytest.mark.parametrize("num_buffers", [1, 3, 64])
@pytest.mark.parametrize("line_bytes", [0, 1 << 10, 1 << 16], ids=["no_lines", "few", "many"])
def test_every_row_is_found_wherever_it_lies(
    memory_chunks: int, num_buffers: int, line_bytes: int, tmp_path: Path
) -> None:
    with open_shelf(
        tmp_path,
        6,
        memory_chunks=memory_chunks,
        num_buffers=num_buffers,
        line_bytes=line_bytes,
    ) as shelf:
        assert shelf.locate(ALL).all()
        assert shelf.locate(ALL[:, ::-1]).all()
        assert shelf.counters.late_rows == 0


def test_rows_in_memory_are_read_in_place(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 6, memory_chunks=6) as shelf:
        found = shelf.locate(ALL)
        tier = shelf.store.tiers[0]
        assert isinstance(tier, MemoryTier)
        slab = tier.pool.slab
        assert ((found >= slab.data_ptr()) & (found < slab.data_ptr() + slab.nbytes)).all()
        assert shelf.counters.loaded_bytes == {"cpu": ALL.size * ROW_BYTES}
        assert shelf.counters.line_lookups == 0


def test_id_that_is_none_has_no_address(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 6, memory_chunks=3) as shelf:
        found = shelf.locate(tokens(5, -1, 23, -1))
        assert (found != 0).tolist() == [[True, False, True, False]] * len(HEADS)


def test_ids_of_some_heads_are_rows_of_these_heads(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 2, memory_chunks=1) as shelf:
        ids = np.array([[1, SIZE + 1]])
        [found] = shelf.reader.locate(0, (OWNER, 0), 0, shelf.chunks, [1], ids)
        expected = [shelf.contents[chunk][1, 1] for chunk in shelf.chunks]
        assert [row_at(address) for address in found.tolist()] == [
            row.numpy().tobytes() for row in expected
        ]


def test_row_that_was_read_is_in_a_line_the_next_time(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 6) as shelf:
        shelf.locate(ALL)
        read_bytes = shelf.counters.loaded_bytes["disk"]
        shelf.locate(ALL)
        assert shelf.counters.loaded_bytes["disk"] == read_bytes
        assert (shelf.counters.line_lookups, shelf.counters.line_hits) == (2 * ALL.size, ALL.size)
        assert shelf.reader.num_used_lines == ALL.size <= shelf.reader.num_lines


def test_each_head_of_a_chunk_is_read_once_for_all_its_tokens(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 6) as shelf:
        shelf.locate(tokens(0, 1, 2, SIZE))
        assert shelf.counters.loaded_bytes["disk"] == 2 * LAYOUT.chunk_bytes


def test_chunk_on_its_way_to_the_disk_is_read_from_its_buffer_and_then_from_the_disk(
    tmp_path: Path,
) -> None:
    with open_shelf(tmp_path, 1, line_bytes=0) as shelf:
        shelf.contents |= put(shelf.store, 2, seed=2)
        last = shelf.chunks[-1]
        pending = shelf.store.table[last].pending
        assert pending is not None
        found = shelf.locate(tokens(2 * SIZE))
        assert found[0, 0] == pending.data_ptr()
        shelf.store.drain()
        assert shelf.locate(tokens(2 * SIZE))[0, 0] != pending.data_ptr()
        assert shelf.counters.loaded_bytes["disk"] == LAYOUT.chunk_bytes


@pytest.mark.parametrize("promotes", [True, False], ids=["up", "down"])
def test_rows_of_a_chunk_that_moved_are_found_where_it_is_now(
    promotes: bool, tmp_path: Path
) -> None:
    with open_shelf(tmp_path, 3, memory_chunks=2) as shelf:
        shelf.locate(tokens(*range(3 * SIZE)))
        if promotes:
            gone = shelf.chunks[0]
            shelf.store.release([gone])
            del shelf.contents[gone]
            last = shelf.chunks[-1]
            content = torch.zeros(LAYOUT.slot_bytes, dtype=torch.uint8)
            content[: LAYOUT.chunk_bytes] = shelf.contents[last].flatten().view(torch.uint8)
            assert shelf.store.promote(last, 0, content)
        else:
            shelf.store.shrink(0, 0)
            shelf.store.drain()
        lookups = shelf.counters.line_lookups
        ids = tokens(*range(len(shelf.chunks) * SIZE))
        assert shelf.locate(ids).all()
        assert shelf.counters.line_lookups - lookups == (0 if promotes else ids.size)


def test_lines_of_a_released_chunk_are_dropped_and_a_new_chunk_is_read_afresh(
    tmp_path: Path,
) -> None:
    with open_shelf(tmp_path, 2) as shelf:
        shelf.locate(tokens(*range(2 * SIZE)))
        gone = shelf.chunks[1]
        shelf.store.release([gone])
        del shelf.contents[gone]
        shelf.contents |= put(shelf.store, 1, seed=3)
        shelf.store.drain()
        assert shelf.locate(tokens(0)).all()
        assert shelf.reader.num_used_lines == len(HEADS) * SIZE
        assert shelf.locate(tokens(*range(2 * SIZE))).all()


def test_rows_that_share_chunks_share_lines(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 2) as shelf:
        shelf.locate(tokens(0, 5), row=0)
        shelf.locate(tokens(5, 0), row=1)
        assert shelf.counters.line_hits == 2 * len(HEADS)


def test_forgotten_owner_leaves_no_tables_and_can_come_back(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 2) as shelf:
        shelf.locate(tokens(0))
        shelf.reader.forget(OWNER + 1)
        assert shelf.reader._places._rows
        shelf.reader.forget(OWNER)
        assert not shelf.reader._places._rows
        assert shelf.locate(tokens(1)).all()


def test_numbers_of_dead_chunks_are_used_again(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 2, memory_chunks=2) as shelf:
        for seed in range(20):
            assert shelf.reader.locate(0, (OWNER, 0), seed, shelf.chunks, HEADS, tokens(0, 7)).all()
            shelf.store.release(shelf.chunks)
            shelf.contents = put(shelf.store, 2, seed)
        assert len(shelf.reader._places._addresses) <= 8


def test_wait_of_no_time_returns_what_is_there_and_the_rest_the_next_time(tmp_path: Path) -> None:
    gate = Gate()
    preadv = FlakyCall(os.preadv, gate, armed=False)
    with open_shelf(tmp_path, 6, memory_chunks=2, preadv=preadv, num_buffers=64) as shelf:
        preadv.armed = True
        ids = tokens(*range(6 * SIZE))
        found = shelf.locate(ids, 0.0)
        assert ((found != 0) == (ids < 2 * SIZE)).all()
        assert shelf.counters.late_rows == 4 * SIZE * len(HEADS)
        gate.open()
        shelf.land()
        assert shelf.locate(ids, 0.0).all()
        assert shelf.counters.late_rows == 4 * SIZE * len(HEADS)


def test_best_tokens_are_read_first_when_there_is_no_time_for_all(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 6, num_buffers=4) as shelf:
        ids = tokens(5 * SIZE, 3 * SIZE, 1, 2 * SIZE)
        shelf.locate(ids, 0.0)
        shelf.land()
        found = shelf.locate(ids, 0.0)
        assert (found != 0).tolist() == [[True, True, False, False]] * len(HEADS)


def test_row_that_is_being_read_is_not_read_again_but_waited_for(tmp_path: Path) -> None:
    gate = Gate()
    preadv = FlakyCall(os.preadv, gate, armed=False)
    with open_shelf(tmp_path, 2, preadv=preadv) as shelf:
        preadv.armed = True
        assert not shelf.locate(tokens(0), 0.0).any()
        gate.open()
        assert shelf.locate(tokens(1, 0)).all()
        assert shelf.counters.loaded_bytes["disk"] == LAYOUT.chunk_bytes


def test_prefetched_rows_are_in_lines_at_the_next_call(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 6, memory_chunks=1, num_buffers=64) as shelf:
        kept = shelf.locate(tokens(0, 2 * SIZE))
        before = [row_at(address) for address in kept.ravel().tolist()]
        assert shelf.prefetch(tokens(1, 2 * SIZE, 3 * SIZE, -1, 4 * SIZE)) == 3 * len(HEADS)
        assert shelf.prefetch(tokens(3 * SIZE + 1)) == 0
        assert [row_at(address) for address in kept.ravel().tolist()] == before
        shelf.land()
        hits = shelf.counters.line_hits
        assert shelf.locate(tokens(3 * SIZE, 3 * SIZE + 1, 4 * SIZE), 0.0).all()
        assert shelf.counters.line_hits - hits == 3 * len(HEADS)


def test_prefetch_takes_half_of_the_buffers_at_most(tmp_path: Path) -> None:
    gate = Gate()
    preadv = FlakyCall(os.preadv, gate, armed=False)
    with open_shelf(tmp_path, 6, preadv=preadv, num_buffers=8) as shelf:
        preadv.armed = True
        assert shelf.prefetch(ALL) == 4
        assert shelf.prefetch(ALL) == 0
        gate.open()
        assert shelf.locate(ALL).all()


def test_prefetch_of_what_is_in_memory_reads_nothing(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 6, memory_chunks=6) as shelf:
        assert shelf.prefetch(ALL) == 0
        assert shelf.reader.num_flying == 0


def test_chunk_released_while_it_is_read_is_buried_when_the_read_is_taken(tmp_path: Path) -> None:
    gate = Gate()
    preadv = FlakyCall(os.preadv, gate, armed=False)
    with open_shelf(tmp_path, 2, preadv=preadv) as shelf:
        preadv.armed = True
        shelf.locate(tokens(SIZE), 0.0)
        gone = shelf.chunks[1]
        shelf.store.release([gone])
        del shelf.contents[gone]
        assert gone in shelf.store.table
        gate.open()
        shelf.reader.settle()
        assert gone not in shelf.store.table
        shelf.locate(tokens(0))
        assert shelf.reader.num_used_lines == 0


def test_closed_reader_waits_for_reads_and_keeps_no_rows(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 2) as shelf:
        shelf.prefetch(tokens(0, SIZE))
        shelf.reader.close()
        shelf.reader.close()
        shelf.check_nothing_left()
        assert (shelf.reader.num_lines, shelf.reader.num_used_lines) == (0, 0)


def test_rows_of_a_pool_are_copied_from_slot_and_line(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 3, memory_chunks=3) as shelf:
        tier = shelf.store.tiers[0]
        assert isinstance(tier, MemoryTier)
        slots, lines = np.array([2, 0, 2]), np.array([0, SIZE + 1, 2 * SIZE - 1])
        rows = tier_rows(tier, RowKeys.of(LAYOUT), slots, lines)
        expected = [
            shelf.contents[ChunkId(int(slot))].reshape(-1, LAYOUT.row_dim)[line]
            for slot, line in zip(slots, lines, strict=True)
        ]
        assert rows.tobytes() == torch.stack(expected).numpy().tobytes()


def test_rows_of_memory_that_cannot_be_read_by_address_are_copied_and_kept_in_lines(
    tmp_path: Path,
) -> None:
    """Scenario: attention on the host, and chunks in the pool of a CUDA device."""
    with open_shelf(tmp_path, 6, memory_chunks=3) as shelf:
        places = shelf.reader._places
        places._foreign, places._levels = places._levels, {}
        assert shelf.prefetch(tokens(0, 3 * SIZE)) == len(HEADS)
        assert shelf.locate(ALL).all()
        assert shelf.counters.loaded_bytes["disk"] == 3 * LAYOUT.chunk_bytes
        shelf.locate(ALL)
        assert shelf.counters.line_hits >= ALL.size


def test_keys_are_divided_by_piece_in_the_order_of_their_first_ones() -> None:
    def parts(wanted: Wanted) -> list[tuple[int, list[int]]]:
        keys = [wanted.part(place).tolist() for place in range(len(wanted))]
        return list(zip(wanted.pieces.tolist(), keys, strict=True))

    names = RowKeys.of(LAYOUT)
    wanted = names.wanted(np.array([9, 4, 8, 5, 0]))
    assert parts(wanted) == [(2, [9, 8]), (1, [4, 5]), (0, [0])]
    assert parts(wanted.some(np.array([2, 0]))) == [(0, [0]), (2, [9, 8])]
    assert parts(wanted.run(1, 3)) == [(1, [4, 5]), (0, [0])]
    none = names.wanted(np.array([], np.int64))
    assert parts(none) == parts(none.some(np.arange(0))) == parts(wanted.run(1, 1)) == []
