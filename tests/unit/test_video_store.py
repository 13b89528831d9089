"""Ranges of tokens of a stream, read from whatever tier they lie on."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import CapacityError, CorruptChunk
from offload.video.stream import chunk_tokens_for
from offload.video.stream_store import StreamStore

HEADS, DIM, CHUNK = 2, 8, 4
SLOT = 4096


def open_store(folder: Path, *, disk: int = 1 << 20) -> StreamStore:
    sizes: dict[str, int | str] = {"gpu": 8 * SLOT, "cpu": 12 * SLOT, "disk": disk}
    return StreamStore(
        2,
        HEADS,
        DIM,
        DIM,
        torch.float32,
        torch.device("cpu"),
        tiers=list(sizes),
        capacity=sizes,
        disk_path=folder,
        chunk_tokens=CHUNK,
    )


def states(num_tokens: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(HEADS, num_tokens, DIM, generator=generator)


@pytest.fixture(scope="module")
def filled(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[StreamStore, torch.Tensor, torch.Tensor]]:
    """A store that has 203 tokens in each layer, most of them on disk."""
    store = open_store(tmp_path_factory.mktemp("stream"))
    keys, values = states(203, 1), states(203, 2)
    for start in range(0, 203, 7):
        for layer in range(2):
            part = slice(start, min(203, start + 7))
            store.append(layer, (layer + 1) * keys[:, part], (layer + 1) * values[:, part])
    store.flush()
    yield store, keys, values
    store.close()


@given(
    st.integers(0, 1),
    st.lists(st.tuples(st.integers(0, 203), st.integers(0, 30)), min_size=1, max_size=6),
)
def test_any_ranges_come_back_one_after_the_other(
    filled: tuple[StreamStore, torch.Tensor, torch.Tensor],
    layer: int,
    ranges: list[tuple[int, int]],
) -> None:
    store, keys, values = filled
    parts = [range(first, min(203, first + count)) for first, count in ranges]
    found_keys, found_values = store.read(layer, parts)
    places = [token for part in parts for token in part]
    assert torch.equal(found_keys, (layer + 1) * keys[:, places])
    assert torch.equal(found_values, (layer + 1) * values[:, places])


def test_bytes_are_counted_by_the_tier_that_they_came_from(
    filled: tuple[StreamStore, torch.Tensor, torch.Tensor],
) -> None:
    store, _, _ = filled
    store.bytes_from.clear()
    store.read(0, [range(203)])
    chunk_bytes = HEADS * CHUNK * 2 * DIM * 4
    assert sum(store.bytes_from.values()) == 203 // CHUNK * chunk_bytes
    assert store.bytes_from["disk"] > store.bytes_from["cpu"] > 0


def test_append_that_does_not_fit_leaves_the_layer_as_it_was(tmp_path: Path) -> None:
    store = open_store(tmp_path, disk=16 * SLOT)
    try:
        keys = states(40, 3)
        store.append(0, keys, keys)
        with pytest.raises(CapacityError):
            store.append(0, states(4000, 4), states(4000, 5))
        found, _ = store.read(0, [range(40)])
        assert torch.equal(found, keys)
        store.append(0, keys, keys)
        assert torch.equal(store.read(0, [range(36, 44)])[0], torch.cat([keys, keys], 1)[:, 36:44])
    finally:
        store.close()


def test_truncated_store_goes_on_from_there(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    try:
        keys, more = states(30, 6), states(9, 7)
        for layer in range(2):
            store.append(layer, keys, keys)
        store.truncate(21)
        assert store.num_tokens == 21
        for layer in range(2):
            store.append(layer, more, more)
        assert torch.equal(store.read(1, [range(30)])[0], torch.cat([keys[:, :21], more], 1))
    finally:
        store.close()


@pytest.mark.parametrize(
    ("unit_tokens", "chunk_tokens"),
    [(None, 64), (4, 64), (36, 36), (144, 72), (196, 98), (257, 64)],
)
def test_chunks_fit_units_that_are_all_alike(unit_tokens: int | None, chunk_tokens: int) -> None:
    assert chunk_tokens_for(unit_tokens) == chunk_tokens


def test_reads_under_way_at_once_do_not_share_memory(
    filled: tuple[StreamStore, torch.Tensor, torch.Tensor],
) -> None:
    store, keys, _ = filled
    pending = [store.start_read(layer, [range(203)]) for layer in (0, 1, 0)]
    pending[1].abandon()
    for place in (2, 0):
        assert torch.equal(pending[place].result()[0], keys)


def test_chunks_of_a_read_keep_their_places_until_it_has_ended(
    filled: tuple[StreamStore, torch.Tensor, torch.Tensor],
) -> None:
    store, _, _ = filled
    table = store.engine.store.table
    pending = store.start_read(0, [range(203)])
    assert len(table.protected) == 203 // CHUNK
    pending.abandon()
    assert not table.protected


def test_record_that_is_damaged_is_an_error_and_the_next_read_goes_on(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    try:
        keys = states(200, 8)
        for layer in range(2):
            store.append(layer, keys, keys)
        store.flush()
        files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
        largest = max(files, key=lambda path: path.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[10 - SLOT] ^= 1  # in the payload of the last record
        largest.write_bytes(content)
        damaged = 0
        for layer in range(2):
            try:
                store.read(layer, [range(200)])
            except CorruptChunk:
                damaged += 1
        assert damaged == 1
        assert not store.engine.store.table.protected
        assert torch.equal(store.read(0, [range(8)])[0], keys[:, :8])
    finally:
        store.close()
