"""The header of a channel block's file."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offload.errors import ConfigError, CorruptChunk
from offload.tiers.near.channel_block import Block, BlockFormat
from offload.types import PAGE_BYTES, ChunkLayout

LAYOUT = ChunkLayout(3, 16, 8, 4, torch.bfloat16)
FORMAT = BlockFormat(LAYOUT, "worker-0")
SLOTS = (5, 0, 2**63 - 1)


def make_block(slots: tuple[int, ...] = SLOTS) -> Block:
    rng = np.random.default_rng(len(slots))
    return Block(
        17,
        (31, -1),
        slots,
        rng.random((3, 8), np.float32),
        rng.random((3, 4), np.float32),
        FORMAT.header_bytes(len(slots)),
        rng.integers(0, 2**64, (3, 8), np.uint64),
    )


def parse(header: bytes, fmt: BlockFormat = FORMAT, number: int = 17) -> Block:
    """Read a header as a reader of a file of the right length does."""
    num_chunks = fmt.num_chunks(header[:PAGE_BYTES], FORMAT.file_bytes(len(SLOTS)), "file")
    return fmt.parse(header[: fmt.header_bytes(num_chunks)], number, "file")


@pytest.mark.parametrize("num_chunks", [1, 3, 700])
def test_block_is_the_same_after_packing_and_parsing(num_chunks: int) -> None:
    block = make_block(tuple(range(num_chunks)))
    header = FORMAT.pack(block)
    file_bytes = FORMAT.file_bytes(num_chunks)
    assert len(header) == block.start
    assert file_bytes - len(header) >= num_chunks * 16 * 3 * 8
    assert FORMAT.num_chunks(header[:PAGE_BYTES], file_bytes, "file") == num_chunks
    found = FORMAT.parse(header, 17, "file")
    assert (found.number, found.lane, found.slots) == (block.number, block.lane, block.slots)
    assert found.start == block.start
    assert found.codes is None
    assert np.array_equal(found.scales, block.scales)
    assert np.array_equal(found.value_means, block.value_means)
    assert np.array_equal(found.checksums, block.checksums)


@given(st.integers(0, 8 * PAGE_BYTES - 1))
def test_header_with_any_bit_flipped_is_corrupt(bit: int) -> None:
    header = bytearray(FORMAT.pack(make_block()))
    assert len(header) == PAGE_BYTES
    header[bit // 8] ^= 1 << bit % 8
    with pytest.raises(CorruptChunk, match="file: "):
        parse(bytes(header))


@pytest.mark.parametrize(
    "other",
    [
        BlockFormat(LAYOUT, "worker-1"),
        BlockFormat(ChunkLayout(3, 16, 8, 4, torch.float16), "worker-0"),
        BlockFormat(ChunkLayout(2, 16, 8, 4, torch.bfloat16), "worker-0"),
        BlockFormat(ChunkLayout(3, 16, 8, 5, torch.bfloat16), "worker-0"),
    ],
    ids=["token", "dtype", "heads", "width"],
)
def test_header_of_another_store_is_corrupt(other: BlockFormat) -> None:
    with pytest.raises(CorruptChunk, match="should be"):
        parse(FORMAT.pack(make_block()), other)


def test_header_under_another_number_is_corrupt() -> None:
    with pytest.raises(CorruptChunk, match="should be block 18, the header says 17"):
        parse(FORMAT.pack(make_block()), number=18)


@pytest.mark.parametrize("num_bytes", [0, 1, 79, 80, 4095])
def test_page_that_ends_too_early_is_corrupt(num_bytes: int) -> None:
    with pytest.raises(CorruptChunk):
        parse(FORMAT.pack(make_block())[:num_bytes])


@pytest.mark.parametrize("file_bytes", [0, PAGE_BYTES, FORMAT.file_bytes(3) - 1, 1 << 40])
def test_file_of_another_length_is_corrupt(file_bytes: int) -> None:
    with pytest.raises(CorruptChunk, match=f"3 chunks in {file_bytes} bytes"):
        FORMAT.num_chunks(FORMAT.pack(make_block()), file_bytes, "file")


def test_dtype_that_no_record_has_is_refused() -> None:
    with pytest.raises(ConfigError, match="complex64"):
        BlockFormat(ChunkLayout(3, 16, 8, 4, torch.complex64), "worker-0")
