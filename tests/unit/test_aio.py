"""Batches of small reads through the kernel's asynchronous I/O."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from offload.tiers.aio import ReadQueue, thread_queue
from offload.tiers.pool import page_aligned
from offload.tiers.syscalls import supports_direct_io
from offload.types import PAGE_BYTES

NUM_PAGES = 512


@pytest.fixture
def queue(tmp_path: Path) -> ReadQueue:
    found = thread_queue()
    if found is None or not supports_direct_io(tmp_path):
        pytest.skip("no asynchronous reads, or no O_DIRECT, on this machine")
    return found


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    """A file whose page ``i`` is full of ``i % 251``, opened past the page cache."""
    path = tmp_path / "pages"
    path.write_bytes(b"".join(bytes([i % 251]) * PAGE_BYTES for i in range(NUM_PAGES)))
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    yield fd
    os.close(fd)


def pages_of(queue: ReadQueue, fd: int, pages: list[int], length: int = 1) -> tuple[bool, bytes]:
    memory = page_aligned(len(pages) * length * PAGE_BYTES)
    offsets = np.array(pages, np.int64) * PAGE_BYTES
    addresses = memory.data_ptr() + np.arange(len(pages)) * length * PAGE_BYTES
    sizes = np.full(len(pages), length * PAGE_BYTES)
    is_whole = queue.read(fd, offsets, addresses, sizes)
    return is_whole, memory.numpy().tobytes()


@pytest.mark.parametrize("count", [1, 127, 128, 129, 400])
def test_batch_of_any_size_brings_every_page(queue: ReadQueue, file: int, count: int) -> None:
    pages = [(7 * i + 3) % NUM_PAGES for i in range(count)]
    is_whole, found = pages_of(queue, file, pages)
    assert is_whole
    assert found[::PAGE_BYTES] == bytes(page % 251 for page in pages)
    assert found[PAGE_BYTES - 1 :: PAGE_BYTES] == bytes(page % 251 for page in pages)


def test_read_beyond_the_end_of_the_file_is_not_whole(queue: ReadQueue, file: int) -> None:
    assert not pages_of(queue, file, [0, NUM_PAGES - 1], length=2)[0]
    assert pages_of(queue, file, [0, NUM_PAGES - 2], length=2)[0]


def test_read_of_what_is_no_file_is_not_whole(queue: ReadQueue) -> None:
    assert not pages_of(queue, 1 << 20, [0])[0]


def test_memory_that_is_not_page_aligned_is_refused_by_the_kernel(
    queue: ReadQueue, file: int
) -> None:
    memory = page_aligned(3 * PAGE_BYTES)
    one = np.ones(1, np.int64)
    assert not queue.read(file, 0 * one, memory.data_ptr() + 64 * one, PAGE_BYTES * one)


def test_every_thread_has_a_queue_of_its_own(queue: ReadQueue) -> None:
    found: list[ReadQueue | None] = []
    thread = threading.Thread(target=lambda: found.append(thread_queue()))
    thread.start()
    thread.join()
    assert thread_queue() is queue
    assert found[0] is not None
    assert found[0] is not queue
