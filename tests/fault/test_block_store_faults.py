"""A store of blocks on a disk that lies, refuses, hangs, or loses its process."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from offload.types import PAGE_BYTES
from tests.support.blocks import (
    RECORD_BYTES,
    ROW_BYTES,
    content,
    flip_bit,
    load_blocks,
    make_store,
    store_blocks,
)
from tests.support.disk import WAIT_S, FlakyCall, Gate, fail_with

NAMES = [b"a", b"b", b"c", b"d"]
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("offset", [PAGE_BYTES, PAGE_BYTES + ROW_BYTES - 1])
def test_flipped_payload_is_a_miss_and_set_aside_and_its_neighbours_are_read(
    tmp_path: Path, offset: int
) -> None:
    store = make_store(tmp_path, 15 + 16)
    store_blocks(store, NAMES)
    flip_bit(store, 1, offset)
    assert load_blocks(store, NAMES) == [True, False, True, True]
    assert not store.holds(b"b")
    assert store.stats.num_corrupt == 1
    assert len(list(store.folder.glob("quarantine/*.kvrecord"))) == 1
    store.check_integrity()
    store.close()
    again = make_store(tmp_path, 15 + 16)
    assert [again.holds(name) for name in NAMES] == [True, False, True, True]
    assert store_blocks(again, [b"b"]) == load_blocks(again, [b"b"]) == [True]
    again.close()


@pytest.mark.parametrize("offset", [0, 20, 4090])
def test_flipped_header_is_a_miss_when_the_store_is_opened(tmp_path: Path, offset: int) -> None:
    store = make_store(tmp_path)
    store_blocks(store, NAMES)
    flip_bit(store, 2, offset)
    store.close()
    again = make_store(tmp_path)
    assert load_blocks(again, NAMES) == [True, True, False, True]
    again.close()


def test_truncated_file_is_misses(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store_blocks(store, NAMES)
    [path] = store.folder.glob("*.kvseg")
    os.truncate(path, 2 * RECORD_BYTES + PAGE_BYTES)
    assert load_blocks(store, NAMES) == [True, True, False, False]
    store.check_integrity()
    store.close()


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_refused_write_stores_nothing_and_the_next_one_does(tmp_path: Path, code: int) -> None:
    pwritev = FlakyCall(os.pwritev, fail_with(code))
    store = make_store(tmp_path, pwritev=pwritev)
    assert store_blocks(store, NAMES) == [False] * 4
    assert (store.num_blocks, store.stats.num_failed) == (0, 4)
    pwritev.armed = False
    assert store_blocks(store, NAMES) == load_blocks(store, NAMES) == [True] * 4
    store.check_integrity()
    store.close()


def test_header_that_was_not_written_is_no_block(tmp_path: Path) -> None:
    def refuse_headers(buffers: Sequence[memoryview], offset: int) -> None:
        if sum(map(len, buffers)) == PAGE_BYTES:
            raise OSError(errno.EIO, "no header")

    store = make_store(tmp_path, pwritev=FlakyCall(os.pwritev, refuse_headers))
    assert store_blocks(store, NAMES) == [False] * 4
    store.close()
    again = make_store(tmp_path)
    assert again.num_blocks == 0
    again.close()


def test_refused_read_is_a_miss_and_the_block_can_be_stored_again(tmp_path: Path) -> None:
    preadv = FlakyCall(os.preadv, fail_with(errno.EIO), armed=False)
    store = make_store(tmp_path, preadv=preadv)
    store_blocks(store, NAMES)
    preadv.armed = True
    assert load_blocks(store, NAMES) == [False] * 4
    preadv.armed = False
    assert store_blocks(store, NAMES) == load_blocks(store, NAMES) == [True] * 4
    store.close()


def test_hung_read_is_given_up_and_does_not_touch_its_row_when_it_ends(tmp_path: Path) -> None:
    gate = Gate()
    preadv = FlakyCall(os.preadv, gate, armed=False)
    store = make_store(tmp_path, preadv=preadv)
    store_blocks(store, NAMES)
    store.deadline_s = 0.2
    preadv.armed = True
    row = content(b"x")
    batch = store.submit_load([b"a"], [row])
    assert gate.reached.wait(WAIT_S)
    store.drain()
    assert batch.results == [False]
    assert store.is_hanging
    assert not store.holds(b"b")
    assert store_blocks(store, [b"e"]) == load_blocks(store, [b"b"]) == [False]
    gate.open()
    preadv.armed = False
    store.close()
    assert (row == content(b"x")).all()
    assert store.stats.num_given_up == 1


def test_hung_write_is_given_up_and_its_slot_goes_to_nobody_until_it_ends(tmp_path: Path) -> None:
    gate = Gate()
    pwritev = FlakyCall(os.pwritev, gate)
    store = make_store(tmp_path, 1, deadline_s=0.2, pwritev=pwritev)
    batch = store.submit_store([b"a"], [content(b"a")])
    assert gate.reached.wait(WAIT_S)
    store.drain()
    assert batch.results == [False]
    assert store_blocks(store, [b"b"]) == [False]
    store.check_integrity()
    gate.open()
    store.close()
    again = make_store(tmp_path, 1)
    assert load_blocks(again, [b"a"]) == [True]
    again.close()


def test_killed_process_leaves_whole_blocks_and_no_others(tmp_path: Path) -> None:
    code = f"""
from pathlib import Path
from tests.support.blocks import make_store, store_blocks
store = make_store(Path({str(tmp_path)!r}), 12)
for number in range(1_000_000):
    store_blocks(store, [b"%d" % (8 * number + each) for each in range(8)])
    print(8 * number, flush=True)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while (last := int(process.stdout.readline())) < 400:
            pass
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().split()
    last = int(rest[-1]) if rest and rest[-1].isdigit() else last
    store = make_store(tmp_path, 12)
    names = [b"%d" % number for number in range(last, last + 16)]
    held = [name for name in names if store.holds(name)]
    assert held
    assert load_blocks(store, held) == [True] * len(held)
    store.check_integrity()
    store.close()
