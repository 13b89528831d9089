"""What watches the pipeline sees what was read, and reads and encodes as the model of it says."""

import json
import math
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from offload.pipeline_control import PipelineControl
from offload.prefetch.pipeline import CodecCost, LayerWork, Links
from offload.prefetch.stage_clock import StageClock
from offload.sparse.row_plan import RowMemory, RowPlan
from offload.sparse.row_reader import RowReader
from offload.stats import Counters
from offload.tiers.codec_choice import CodecChoice
from offload.tiers.codec_ladder import CODECS, find_codec
from offload.tiers.disk import DiskTier
from offload.tiers.pool import as_chunk, page_aligned
from offload.tiers.read_meter import Fetched, ReadMeter
from offload.types import PAGE_BYTES, ChunkInfo, ChunkLayout
from tests.support.disk import WAIT_S
from tests.support.rows import HEADS, MANY_LINES, Ints, Shelf, open_shelf, tokens
from tests.support.stores import LAYOUT

SLOW = Links(50e6, 1e-4, math.inf, is_shared=True)
FAST = Links(50e9, 0.0, math.inf, is_shared=True)
CODES = [CodecCost("kivi4", 3.5, 1e9, error=0.1), CodecCost("bf16x", 1.4, 2e9)]
WORK = LayerWork(disk_bytes=1e8, host_bytes=0, num_reads=1000, compute_s=0)
SIZE = LAYOUT.chunk_tokens


def make_choice() -> CodecChoice:
    return CodecChoice(SIZE, find_codec("raw"))


def watch(
    shelf: Shelf,
    links: Links = SLOW,
    work: LayerWork | None = None,
    *,
    least_share: float | None = None,
) -> PipelineControl:
    """Have a control watch the rows that a shelf reads, from now on."""
    assert isinstance(shelf.disk, DiskTier)
    control = PipelineControl(
        StageClock(links),
        shelf.disk,
        shelf.counters,
        make_choice(),
        is_auto=False,
        least_share=least_share,
    )
    if work is not None:
        control.plan_for(work)
    limit(shelf, control.layer_begins)
    return control


def limit(shelf: Shelf, most: Callable[[int], int | None]) -> None:
    shelf.reader.close()
    memory = RowMemory(16 * PAGE_BYTES, MANY_LINES)
    plan = RowPlan(piece_tokens=None, least_disk_share=0.0)
    shelf.reader = RowReader(shelf.store, torch.device("cpu"), memory, plan, most)


def num_samples(control: PipelineControl, stage: str) -> int:
    found: int = control.stats()["stages"][stage]["num_samples"]
    return found


def test_reads_are_observed_when_the_next_layer_begins(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 4) as shelf:
        assert isinstance(shelf.disk, DiskTier)
        control = watch(shelf)
        shelf.locate(tokens(0, SIZE))
        assert num_samples(control, "disk") == num_samples(control, "compute") == 0
        read = shelf.disk.meter.fetched
        shelf.locate(tokens(0, SIZE))
        assert num_samples(control, "disk") == num_samples(control, "compute") == 1
        disk = control.stats()["stages"]["disk"]
        expected_s = read.num_reads * SLOW.read_s + read.num_bytes / SLOW.disk_bytes_per_s
        assert disk["estimated_s"] == pytest.approx(expected_s)
        assert disk["measured_s"] == pytest.approx(shelf.disk.reading.total_s)
        shelf.locate(tokens(0, SIZE))  # both were in the cache of lines
        assert num_samples(control, "disk") == 1
        assert num_samples(control, "compute") == 2


def test_bytes_whose_reads_still_go_on_are_observed_with_their_time(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 1) as shelf:
        assert isinstance(shelf.disk, DiskTier)
        control = watch(shelf)
        control.layer_begins(1)
        shelf.disk.meter.add(50_000_000, 3)
        control.layer_begins(1)
        shelf.disk.meter.add(50_000_000, 2)
        control.layer_begins(1)
        assert num_samples(control, "disk") == 0
        shelf.disk.reading.run(lambda: None)
        control.layer_begins(1)
        assert num_samples(control, "disk") == 1
        expected_s = 2 + 5 * SLOW.read_s
        assert control.stats()["stages"]["disk"]["estimated_s"] == pytest.approx(expected_s)
        shelf.disk.reading.run(lambda: None)
        control.layer_begins(1)
        assert num_samples(control, "disk") == 1


def test_time_of_decoding_is_observed_by_codec_where_there_is_a_choice(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 1) as shelf:
        assert isinstance(shelf.disk, DiskTier)
        clock = StageClock(SLOW, CODES)
        control = PipelineControl(clock, shelf.disk, shelf.counters, make_choice(), is_auto=True)
        control.layer_begins(0)
        for name in ("kivi4", "int8"):
            shelf.disk.meter.add_decoded(find_codec(name).number, 10**9, 2.0)
        control.layer_begins(0)
        assert num_samples(control, "decode") == 1
        kivi, lossless = (codec.decode_bytes_per_s for codec in clock.codecs())
        assert kivi < CODES[0].decode_bytes_per_s
        assert lossless == pytest.approx(CODES[1].decode_bytes_per_s)


def column(*chunks: int) -> Ints:
    """Return the first token of some chunks for the first head, and none for the others."""
    ids = np.full((len(HEADS), len(chunks)), -1, dtype=np.int64)
    ids[0] = np.array(chunks) * SIZE
    return ids


@pytest.mark.parametrize(
    ("share", "num_read"), [(0.0, 0), (0.2, 1), (0.5, 3), (0.6, 3), (0.9, 5), (1.0, 5)]
)
def test_on_a_disk_that_nothing_hides_the_least_share_is_read_best_first(
    share: float, num_read: int, tmp_path: Path
) -> None:
    with open_shelf(tmp_path, 6) as shelf:
        watch(shelf, work=WORK, least_share=share)
        order = (4, 1, 5, 0, 2)
        found = shelf.locate(column(*order))
        assert (found[0] != 0).tolist() == [True] * num_read + [False] * (5 - num_read)
        assert shelf.counters.late_rows == 5 - num_read


def test_rows_of_one_piece_are_read_or_left_together(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 3) as shelf:
        watch(shelf, work=WORK, least_share=0.5)
        ids = np.array([[8, 0, 9, 1, 10, 2]] * len(HEADS), dtype=np.int64)
        found = shelf.locate(ids)
        assert (found != 0).tolist() == [[True, False] * 3] * len(HEADS)
        assert shelf.counters.late_rows == 3 * len(HEADS)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_compute_hides_is_read_whatever_the_least_share(share: float, tmp_path: Path) -> None:
    with open_shelf(tmp_path, 6) as shelf:
        watch(shelf, FAST, replace(WORK, compute_s=10.0), least_share=share)
        assert shelf.locate(column(0, 1, 2, 3, 4)).any()
        assert shelf.counters.late_rows == 0


def test_without_a_plan_or_a_least_share_everything_is_read(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 6) as shelf:
        for options in ({"least_share": 0.0}, {"work": WORK}):
            watch(shelf, **options)
            shelf.locate(column(0, 1, 2, 3, 4))
        assert shelf.counters.late_rows == 0


@pytest.mark.parametrize("most", [None, 0, 1, 3, 99])
def test_limit_is_told_of_pieces_that_are_in_no_memory_once_for_each_call(
    most: int | None, tmp_path: Path
) -> None:
    asked: list[int] = []

    def allow(wanted: int) -> int | None:
        asked.append(wanted)
        return most

    with open_shelf(tmp_path, 5, memory_chunks=2) as shelf:
        limit(shelf, allow)
        on_disk = [i for i, chunk in enumerate(shelf.chunks) if min(slots(shelf, chunk)) == 1]
        assert len(on_disk) == 3
        ids = np.arange(5 * SIZE).reshape(1, -1).repeat(len(HEADS), 0)
        for _ in range(2):
            found = shelf.locate(ids)
        pieces = len(on_disk) * len(HEADS)
        read = pieces if most is None else min(most, pieces)
        assert asked == [pieces, pieces - read]
        missing = np.count_nonzero(found == 0)
        assert missing == max(0, pieces - 2 * read) * SIZE
        shelf.reader.settle()


def slots(shelf: Shelf, chunk: Any) -> Any:
    return shelf.store.table[chunk].slots


def test_meter_counts_what_threads_add_and_hands_out_decoding_once() -> None:
    meter, ready = ReadMeter(), threading.Barrier(4)

    def add() -> None:
        ready.wait(WAIT_S)
        for _ in range(200):
            meter.add(10, 2)
            meter.add_decoded(3, 100, 0.5)

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    meter.add_decoded(1, 7, 0.25)
    assert meter.fetched == Fetched(8000, 1600)
    assert meter.take_decoded() == {3: (80_000, 400.0), 1: (7, 0.25)}
    assert meter.take_decoded() == {}
    assert meter.fetched == Fetched(8000, 1600)


@pytest.mark.parametrize(
    ("links", "codec", "share"),
    [(SLOW, "kivi4", 1.0), (FAST, "raw", 0.0)],
    ids=["slow", "fast"],
)
def test_chunks_are_written_as_the_speed_of_the_disk_asks_for(
    links: Links, codec: str, share: float, tmp_path: Path
) -> None:
    layout = ChunkLayout(2, 64, 32, 32, torch.bfloat16)
    choice = CodecChoice(layout.chunk_tokens, find_codec("int8"))
    capacity = 16 * (PAGE_BYTES + layout.slot_bytes)
    disk = DiskTier(tmp_path, capacity_bytes=capacity, layout=layout, choose_codec=choice)
    with closing(disk):
        control = PipelineControl(StageClock(links, CODES), disk, Counters(), choice, is_auto=True)
        plan = control.plan_for(WORK)
        assert plan.codec.name == codec
        assert plan.share == pytest.approx(share, abs=0.1)
        stats = control.stats()
        assert (stats["codec"], stats["encoded_share"]) == (codec, plan.share)
        written = write_and_read(disk, layout)
        decoded = disk.meter.take_decoded()
        number = find_codec(codec).number
        assert set(decoded) == ({number} if number else set())
        error = float((written[1] - written[0]).norm() / written[0].norm())
        assert (0 < error < 0.2) if number else error == 0


def write_and_read(disk: DiskTier, layout: ChunkLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Write some chunks and read them; return both, float32."""
    infos = [ChunkInfo(i, 0, i * layout.chunk_tokens) for i in range(8)]
    source, out = (page_aligned(8 * layout.slot_bytes).view(8, -1) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    for buffer in source:
        rows = torch.randn(layout.shape, generator=generator)
        as_chunk(buffer, layout).copy_(rows)
    slots = disk.allocate(8)
    disk.write(slots, infos, list(source)).wait(WAIT_S)
    disk.read(slots, infos, list(out)).wait(WAIT_S)
    both = [torch.stack([as_chunk(b, layout) for b in rows]).float() for rows in (source, out)]
    return both[0], both[1]


def test_disk_that_turns_out_to_be_slow_has_later_chunks_encoded(tmp_path: Path) -> None:
    with open_shelf(tmp_path, 1) as shelf:
        assert isinstance(shelf.disk, DiskTier)
        clock, choice = StageClock(FAST, CODES), make_choice()
        control = PipelineControl(clock, shelf.disk, shelf.counters, choice, is_auto=True)
        assert control.plan_for(replace(WORK, disk_bytes=1e15)).codec.name == "raw"
        assert (control.stats()["codec"], control.stats()["encoded_share"]) == ("raw", 0.0)
        for _ in range(60):
            clock.observe_disk(10**8, 1, 10.0)
        assert clock.links().disk_bytes_per_s < 2e7
        for _ in range(64):
            control.layer_begins(0)
        assert choice.current[0].name == "kivi4"
        assert choice.current[1] > 0.5


@pytest.mark.parametrize("codec", CODECS)
def test_share_that_is_encoded_is_that_of_the_codec_and_none_for_raw(
    codec: str, tmp_path: Path
) -> None:
    with open_shelf(tmp_path, 1) as shelf:
        assert isinstance(shelf.disk, DiskTier)
        choice = CodecChoice(SIZE, find_codec(codec))
        control = PipelineControl(
            StageClock(SLOW), shelf.disk, shelf.counters, choice, is_auto=False
        )
        stats = json.loads(json.dumps(control.stats(), allow_nan=False))
        assert stats["codec"] == codec
        assert stats["encoded_share"] == (0.0 if codec == "raw" else 1.0)
        assert stats["bus_bytes_per_s"] is None
