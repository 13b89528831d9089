import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload.errors import CorruptChunk
from offload.tiers.buffers import Buffers
from offload.tiers.io_engine import SCRATCH_PAGES
from offload.tiers.io_plan import MAX_OP_BYTES
from offload.tiers.pool import page_aligned
from offload.tiers.record import RecordFormat
from offload.tiers.record_io import KnownHeaders, RecordIo
from offload.tiers.record_part import Parts
from offload.tiers.record_parts import plan_parts, read_parts
from offload.tiers.segment import slot_at
from offload.tiers.segment_files import SegmentFiles
from offload.types import PAGE_BYTES, ChunkInfo, ChunkLayout

_PAGE_HEADS = ChunkLayout(8, 16, 64, 64, torch.bfloat16)
"""One page for each of 8 heads."""
_FAR_HEADS = ChunkLayout(4, 64, 128, 128, torch.bfloat16)
"""Eight pages for each of 4 heads."""
_ODD_HEADS = ChunkLayout(4, 5, 7, 9, torch.float32)


class _CountedReads:
    """``os.preadv``, and the bytes of each call."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.sizes.append(sum(len(buffer) for buffer in buffers))
        return os.preadv(fd, buffers, offset)


class _Records:
    """Records 0 to ``n - 1`` of some segments, each with its own random content."""

    def __init__(
        self,
        directory: Path,
        layout: ChunkLayout,
        n: int,
        num_segments: int = 1,
        *,
        remembers: bool = False,
    ) -> None:
        self.reads = _CountedReads()
        self.fmt = RecordFormat(layout, b"model")
        self.headers: KnownHeaders | None = {} if remembers else None
        files = SegmentFiles(directory)
        self.io = RecordIo(files, self.fmt, self.reads, headers=self.headers)
        self.directory = directory
        self.places = [(segment, index) for segment in range(num_segments) for index in range(n)]
        self.infos = [ChunkInfo(i, 3, 64 * i) for i in range(len(self.places))]
        memory = page_aligned(len(self.places) * layout.slot_bytes).view(len(self.places), -1)
        self.content = list(memory.random_(0, 256, generator=torch.Generator().manual_seed(1)))
        for op in self.io.plan(self.places, 1):
            self.io.write(op, self.infos, self.content, _scratch())

    def heads(self, record: int, first: int, num_heads: int) -> Tensor:
        heads = self.content[record].split(self.fmt.head_bytes)[first : first + num_heads]
        return torch.cat(heads)

    def read_heads(self, records: Sequence[int], first: int, num_heads: int) -> list[Tensor]:
        slots = [slot_at(*self.places[record]) for record in records]
        infos = [self.infos[record] for record in records]
        num_bytes = num_heads * self.fmt.head_bytes
        stride = -(-num_bytes // PAGE_BYTES) * PAGE_BYTES
        memory = page_aligned(len(records) * stride).view(len(records), stride)
        out = list(memory[:, :num_bytes])
        unit = first * self.fmt.units_per_head
        parts = Parts.of(slots, infos, [unit] * len(slots), Buffers.of(out))
        for job in plan_parts(parts, 1, 4):
            read_parts(job, self.io, _scratch())
        return out

    def damage(self, record: int, offset: int) -> None:
        """Flip one bit of a record."""
        [file] = self.directory.iterdir()
        with file.open("r+b") as opened:
            opened.seek(record * self.fmt.record_bytes + offset)
            [byte] = opened.read(1)
            opened.seek(-1, os.SEEK_CUR)
            opened.write(bytes([byte ^ 1]))


def _scratch() -> memoryview:
    return page_aligned(SCRATCH_PAGES * PAGE_BYTES).numpy().data


@pytest.mark.parametrize(
    ("layout", "first", "num_heads"),
    [
        (_PAGE_HEADS, 0, 1),
        (_PAGE_HEADS, 7, 1),
        (_PAGE_HEADS, 2, 3),
        (_FAR_HEADS, 3, 1),
        (_FAR_HEADS, 0, 4),
        (_ODD_HEADS, 1, 2),
    ],
)
@pytest.mark.parametrize("records", [[4, 1, 1, 0, 5], [2], []], ids=str)
def test_heads_of_any_records_are_what_was_written(
    tmp_path: Path, layout: ChunkLayout, first: int, num_heads: int, records: list[int]
) -> None:
    kept = _Records(tmp_path, layout, n=3, num_segments=2)
    found = kept.read_heads(records, first, num_heads)
    assert len(found) == len(records)
    for record, heads in zip(records, found, strict=True):
        assert torch.equal(heads, kept.heads(record, first, num_heads))


@pytest.mark.parametrize(
    ("layout", "first", "sizes"),
    [
        (_PAGE_HEADS, 0, [2 + 7 + 2 + 7 + 2]),
        (_PAGE_HEADS, 4, [6 + 3 + 6 + 3 + 6]),
        (_PAGE_HEADS, 7, [9 * 3]),
        (_FAR_HEADS, 0, [9, 9, 9]),
        (_FAR_HEADS, 1, [17, 17, 17]),
        (_FAR_HEADS, 2, [1, 17, 17, 8]),
        (_FAR_HEADS, 3, [1, 9, 9, 8]),
    ],
)
def test_heads_are_read_through_gaps_of_at_most_eight_pages(
    tmp_path: Path, layout: ChunkLayout, first: int, sizes: list[int]
) -> None:
    kept = _Records(tmp_path, layout, n=3)
    kept.read_heads([0, 1, 2], first, 1)
    assert kept.reads.sizes == [pages * PAGE_BYTES for pages in sizes]


def test_job_reads_no_more_than_one_operation_may() -> None:
    info, slots = ChunkInfo(0, 0, 0), [slot_at(0, index) for index in range(10_000)]
    for num_bytes in (1, 512, PAGE_BYTES, MAX_OP_BYTES // 3, 2 * MAX_OP_BYTES):
        out = Buffers.of([page_aligned(num_bytes)] * len(slots))
        parts = Parts.of(slots, [info] * len(slots), [0] * len(slots), out)
        most = max(job.num_parts for job in plan_parts(parts, 1, 4))
        assert 1 <= most <= SCRATCH_PAGES // 2
        assert most == 1 or most * (PAGE_BYTES + num_bytes) <= MAX_OP_BYTES


@pytest.mark.parametrize("first", [0, 1, 3], ids="head {}".format)
def test_damage_to_the_heads_or_the_header_of_one_of_several_records_is_found(
    tmp_path: Path, first: int
) -> None:
    kept = _Records(tmp_path, _FAR_HEADS, n=3)
    kept.damage(1, PAGE_BYTES + first * kept.fmt.head_bytes + 5)
    with pytest.raises(CorruptChunk, match=rf"chunk 1 .* first of head {first}"):
        kept.read_heads([0, 1, 2], first, 1)
    kept.read_heads([0, 2], first, 1)
    kept.damage(2, 100)
    with pytest.raises(CorruptChunk, match=r"chunk 2 .* header checksum"):
        kept.read_heads([2], first, 1)


def test_header_that_was_verified_is_not_read_again_and_still_tells_damage(tmp_path: Path) -> None:
    kept = _Records(tmp_path, _FAR_HEADS, n=2, remembers=True)
    head_bytes = kept.fmt.head_bytes
    kept.read_heads([0, 1], 3, 1)
    kept.reads.sizes.clear()
    for record, head in ((0, 3), (1, 0)):
        [found] = kept.read_heads([record], head, 1)
        assert torch.equal(found, kept.heads(record, head, 1))
    assert kept.reads.sizes == [head_bytes, head_bytes]
    kept.damage(0, PAGE_BYTES + 2 * head_bytes)
    with pytest.raises(CorruptChunk, match=r"chunk 0 .* first of head 2"):
        kept.read_heads([0], 2, 1)


def test_header_of_a_damaged_record_or_of_another_chunk_is_not_remembered(tmp_path: Path) -> None:
    kept = _Records(tmp_path, _FAR_HEADS, n=2, remembers=True)
    kept.damage(0, 100)
    with pytest.raises(CorruptChunk, match="header checksum"):
        kept.read_heads([0], 1, 1)
    assert kept.headers == {}
    kept.read_heads([1], 1, 1)
    kept.infos[1] = ChunkInfo(7, 3, 64)
    with pytest.raises(CorruptChunk, match="chunk_id should be 7"):
        kept.read_heads([1], 1, 1)


def test_damage_to_other_heads_and_to_what_lies_between_goes_unnoticed(tmp_path: Path) -> None:
    kept = _Records(tmp_path, _FAR_HEADS, n=1)
    kept.damage(0, PAGE_BYTES + 5)
    [found] = kept.read_heads([0], 1, 1)
    assert torch.equal(found, kept.heads(0, 1, 1))


def test_heads_beyond_the_end_of_the_file_are_corrupt_and_named_by_offset(tmp_path: Path) -> None:
    kept = _Records(tmp_path, _FAR_HEADS, n=2)
    [file] = tmp_path.iterdir()
    end = file.stat().st_size - kept.fmt.head_bytes // 2
    os.truncate(file, end)
    offset = kept.fmt.record_bytes + PAGE_BYTES + 3 * kept.fmt.head_bytes
    with pytest.raises(
        CorruptChunk, match=rf"read of 32768 bytes at offset {offset} of {file}: .* 16384 bytes too"
    ):
        kept.read_heads([0, 1], 3, 1)
