"""The disk tier that attends keeps the contract, with any number of workers, and adds to it."""

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from offload.errors import ClosedError, ConfigError, CorruptChunk
from offload.tiers.near.disk import NearDisk
from offload.tiers.near.sparf_settings import SparF
from offload.tiers.pool import page_aligned
from offload.types import ChunkLayout
from tests.contracts.tier_contract import (
    WAIT_S,
    WHOLE_PAGES,
    TierContract,
    make_buffers,
    make_infos,
)
from tests.support.near import (
    LAYOUT,
    SCALE,
    check_attends,
    draw_query,
    fill,
    held_launcher,
    make_near,
    num_restarts,
)


@pytest.fixture(scope="module", autouse=True)
def _launcher() -> Iterator[None]:
    with held_launcher():
        yield


class NearContract(TierContract):
    num_paths: ClassVar[int] = 1
    has_channels: ClassVar[bool] = False

    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.directory = tmp_path

    def make_tier(self, num_slots: int, layout: ChunkLayout) -> NearDisk:
        return make_near(
            self.directory,
            num_slots,
            layout,
            num_paths=self.num_paths,
            has_channels=self.has_channels,
            block_tokens=4 * layout.chunk_tokens,
        )

    def test_files_on_disk_never_exceed_capacity_under_churn(self) -> None:
        with closing(self.make_tier(8, WHOLE_PAGES)) as tier:
            source, held = make_buffers(3, WHOLE_PAGES, seed=1), []
            for step in range(12):
                held.append(tier.allocate(3, stream=step % 2))
                tier.write(held[-1], make_infos(3, first_id=3 * step), source).wait(WAIT_S)
                assert self.allocated_bytes() <= tier.used_bytes <= tier.capacity_bytes
                if len(held) == 2:
                    tier.free(held.pop(0))
            assert num_restarts(tier) == [0] * self.num_paths

    def test_close_removes_every_file_of_the_tier_and_no_other(self) -> None:
        tier = self.make_tier(8, WHOLE_PAGES)
        tier.write(tier.allocate(8), make_infos(8), make_buffers(8, WHOLE_PAGES)).wait(WAIT_S)
        (self.directory / "path-0" / "mine").write_text("keep")
        assert self.allocated_bytes() > 0
        tier.close()
        assert [path.name for path in self.directory.rglob("*") if path.is_file()] == ["mine"]

    def allocated_bytes(self) -> int:
        """Return what the file system has given to all files."""
        return sum(p.stat().st_blocks * 512 for p in self.directory.rglob("*") if p.is_file())


class TestOneWorker(NearContract):
    pass


class TestTwoWorkers(NearContract):
    num_paths = 2


class TestOneWorkerWithChannels(NearContract):
    has_channels = True


class TestTwoWorkersWithChannels(NearContract):
    num_paths = 2
    has_channels = True


def test_capacity_of_one_byte_less_has_one_slot_less(tmp_path: Path) -> None:
    with closing(make_near(tmp_path, 5, has_channels=True)) as tier:
        capacity_bytes = tier.capacity_bytes
    with closing(
        NearDisk([tmp_path / "b"], capacity_bytes=capacity_bytes - 1, layout=LAYOUT)
    ) as tier:
        assert tier.num_slots == 4


@pytest.mark.parametrize("n", [1, 2, 5])
def test_request_of_more_chunks_than_there_are_frames_goes_in_bursts(
    tmp_path: Path, n: int
) -> None:
    with closing(make_near(tmp_path, shared_bytes=1)) as tier:
        held = fill(tier, 2, n)
        check_attends(tier, held)
        out = [page_aligned(LAYOUT.slot_bytes) for _ in held.infos[0]]
        tier.read(held.flat_slots(0), held.infos[0], out).wait(WAIT_S)
        assert all(map(torch.equal, out, held.buffers[0]))


def test_batch_of_more_rows_than_a_frame_has_room_for_is_answered_in_order(tmp_path: Path) -> None:
    with closing(make_near(tmp_path)) as tier:
        held = fill(tier, 3, 1)
        rows = held.rows() * 400
        query = draw_query(3)
        found = tier.attend(query.repeat(400, 1, 1), rows, SCALE).wait(WAIT_S)
        for part in found:
            assert torch.equal(part[:3].repeat(400, *[1] * (part.dim() - 1)), part)
        check_attends(tier, held)
        assert tier.counters()["attended_rows"] == 1203


def test_row_of_no_chunks_has_no_weight(tmp_path: Path) -> None:
    with closing(make_near(tmp_path)) as tier:
        held = fill(tier, 2, 2)
        row = (7, held.slots[0][:0])
        found = tier.attend(draw_query(1), [row], SCALE).wait(WAIT_S)
        assert not found.out.any()
        assert bool((found.lse == -torch.inf).all())


@pytest.mark.parametrize("how", [None, SparF(8, 0.25)], ids=["dense", "sparf"])
def test_attending_to_a_slot_that_holds_nothing_is_refused(
    tmp_path: Path, how: SparF | None
) -> None:
    with closing(make_near(tmp_path, has_channels=True)) as tier:
        held = fill(tier, 1, 4)
        tier.free(held.flat_slots(0)[1:2])
        with pytest.raises(CorruptChunk, match="1 of 4 slots hold no record"):
            tier.attend(draw_query(1), held.rows(0), SCALE, how)
        again = [(0, held.slots[0][[0, 2, 3]])]
        tier.attend(draw_query(1), again, SCALE, how).wait(WAIT_S)


def test_bus_counts_what_crosses_and_never_the_keys_that_are_attended(tmp_path: Path) -> None:
    with closing(make_near(tmp_path, num_paths=2)) as tier:
        held, query = fill(tier, 1, 3), draw_query(1)
        written = tier.bus.bytes
        assert written.written == 3 * LAYOUT.chunk_bytes
        for _ in range(2):
            tier.attend(query, held.rows(), SCALE).wait(WAIT_S)
        bus = tier.bus.bytes
        heads = query.shape[1]
        # Each of two workers is told the slots of the row, once.
        assert bus.asked == 2 * query.nbytes + 2 * held.slots.nbytes
        assert bus.answered == 2 * heads * (LAYOUT.value_dim + 1) * 4
        assert (bus.written, bus.fetched) == (written.written, 0)
        assert bus.read >= 2 * 3 * LAYOUT.chunk_bytes


@pytest.mark.parametrize(
    ("num_paths", "workers_per_path"), [(3, 1), (1, 3), (2, 2)], ids=["paths", "workers", "both"]
)
def test_more_workers_than_heads_are_refused_before_any_folder_is_made(
    tmp_path: Path, num_paths: int, workers_per_path: int
) -> None:
    with pytest.raises(ConfigError, match=f"{num_paths} paths .* 2 KV heads"):
        make_near(tmp_path, num_paths=num_paths, workers_per_path=workers_per_path)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "path-1").write_text("a file")
    before = os.listdir(tmp_path)
    with pytest.raises(ConfigError, match=r"cannot make .*path-1.*: Not a directory"):
        make_near(tmp_path, num_paths=2)
    assert list((tmp_path / "path-0").iterdir()) == []
    assert set(os.listdir(tmp_path)) - set(before) == {"path-0"}


def test_blocks_shorter_than_a_chunk_are_refused_with_both_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"blocks of 63 tokens .* 64 tokens"):
        make_near(tmp_path, has_channels=True, block_tokens=63)
    assert list((tmp_path / "path-0").iterdir()) == []


@pytest.mark.parametrize("use", ["attend", "write", "counters"])
def test_closed_tier_refuses_every_use(tmp_path: Path, use: str) -> None:
    tier = make_near(tmp_path)
    held = fill(tier, 1, 1)
    calls = {
        "attend": lambda: tier.attend(draw_query(1), held.rows(), SCALE),
        "write": lambda: tier.write(held.flat_slots(0), held.infos[0], held.buffers[0]),
        "counters": tier.counters,
    }
    tier.close()
    with pytest.raises(ClosedError, match="closed"):
        calls[use]()
    tier.free(held.flat_slots(0))
