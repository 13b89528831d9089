"""What the disk tier does with the jobs of one transfer: all are cancelled or none."""

import os
from contextlib import closing
from pathlib import Path

import pytest
import torch

from offload.errors import CorruptChunk, TransferCancelled
from offload.types import PAGE_BYTES
from tests.contracts.tier_contract import (
    WAIT_S,
    WHOLE_PAGES,
    make_buffers,
    make_infos,
    same_chunks,
)
from tests.support.disk import (
    FlakyCall,
    Gate,
    assert_unreadable_and_freeable,
    make_disk_tier,
    read_records,
    write_records,
)


def test_write_of_which_one_job_has_started_is_not_cancelled_and_writes_everything(
    tmp_path: Path,
) -> None:
    gate = Gate()
    tier = make_disk_tier(
        tmp_path,
        8,
        WHOLE_PAGES,
        records_per_segment=1,
        num_threads=1,
        pwritev=FlakyCall(os.pwritev, gate),
    )
    with closing(tier):
        slots, infos, source = tier.allocate(3), make_infos(3), make_buffers(3, WHOLE_PAGES, seed=1)
        transfer = tier.write(slots, infos, source)
        assert gate.reached.wait(WAIT_S)
        assert not transfer.cancel()
        gate.open()
        transfer.wait(WAIT_S)
        assert not transfer.cancel()
        assert same_chunks(read_records(tier, slots, infos), source, WHOLE_PAGES)


def test_queued_write_of_several_jobs_is_cancelled_whole(tmp_path: Path) -> None:
    gate = Gate()
    tier = make_disk_tier(
        tmp_path,
        8,
        WHOLE_PAGES,
        records_per_segment=1,
        num_threads=1,
        pwritev=FlakyCall(os.pwritev, gate),
    )
    with closing(tier):
        slots, infos, source = tier.allocate(4), make_infos(4), make_buffers(4, WHOLE_PAGES, seed=1)
        running = tier.write(slots[:1], infos[:1], source[:1])
        assert gate.reached.wait(WAIT_S)
        queued = tier.write(slots[1:], infos[1:], source[1:])
        assert queued.cancel()
        with pytest.raises(TransferCancelled, match="disk write of 3 chunks, first of layer 0"):
            queued.wait(0)
        gate.open()
        running.wait(WAIT_S)
        assert_unreadable_and_freeable(tier, slots[1:], infos[1:])
        assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("verb", ["read", "read_parts"])
def test_bad_records_of_somebody_else_are_named_after_any_read_that_met_them(
    tmp_path: Path, verb: str
) -> None:
    with (
        closing(make_disk_tier(tmp_path / "theirs", 8, WHOLE_PAGES)) as theirs,
        closing(make_disk_tier(tmp_path / "ours", 8, WHOLE_PAGES)) as ours,
    ):
        _, infos, _ = write_records(theirs, 3)
        [path] = (tmp_path / "theirs").iterdir()
        slots = ours.adopt(path, b"model", [0, 1, 2])
        content = bytearray(path.read_bytes())
        content[ours.record_bytes + PAGE_BYTES + 5] ^= 1
        path.write_bytes(content)
        if verb == "read":
            transfer = ours.read(slots, infos, make_buffers(3, WHOLE_PAGES))
        else:
            out = list(torch.zeros(3, WHOLE_PAGES.chunk_bytes // 2, dtype=torch.uint8))
            parts = slice(0, ours.parts_per_head)
            transfer = ours.read_parts(slots, infos, parts, out)
        with pytest.raises(CorruptChunk, match="chunk 1 "):
            transfer.wait(WAIT_S)
        assert (path, 1) in ours.take_suspects()
        assert ours.take_suspects() == []


def test_file_of_somebody_else_is_forgotten_with_its_last_slot_and_can_come_again(
    tmp_path: Path,
) -> None:
    with (
        closing(make_disk_tier(tmp_path / "theirs", 8, WHOLE_PAGES)) as theirs,
        closing(make_disk_tier(tmp_path / "ours", 8, WHOLE_PAGES)) as ours,
    ):
        _, infos, sources = write_records(theirs, 3)
        [path] = (tmp_path / "theirs").iterdir()
        first = ours.adopt(path, b"model", [0, 1])
        again = ours.adopt(path, b"model", [1, 2])
        assert first[1] == again[0]

        ours.free(first)
        out = make_buffers(1, WHOLE_PAGES)
        ours.read(again[1:], infos[2:], out).wait(WAIT_S)
        assert torch.equal(out[0], sources[2])
        ours.free(again[1:])
        assert not ours._adopted._numbers
        assert path not in ours._files._paths.values()

        [anew] = ours.adopt(path, b"model", [2])
        assert anew not in (*first, *again)
        ours.read([anew], infos[2:], out).wait(WAIT_S)
        assert path.exists()
        ours.check_integrity()
