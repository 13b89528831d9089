import errno
import os
from pathlib import Path

import pytest
import torch

from offload import bandwidth
from offload.bandwidth import measure_disk, measure_link, measure_memcpy, measure_memory_read
from offload.errors import ConfigError, StorageError
from offload.machine import accepts_direct_io, read_disk

MIB = 1 << 20

pytestmark = pytest.mark.leaks


def test_measure_disk_of_a_directory_returns_rates_and_leaves_nothing(tmp_path: Path) -> None:
    directory = tmp_path / "disk"
    directory.mkdir()
    measured = measure_disk(directory, 5 * MIB)
    assert measured.read_bytes_per_s > 0
    assert measured.write_bytes_per_s > 0
    assert 0 < measured.read_latency_s < 1
    assert measured.pieces_per_s > 0
    assert measured.is_direct == accepts_direct_io(directory)
    assert list(directory.iterdir()) == []


def test_measure_disk_without_direct_io_measures_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bandwidth, "accepts_direct_io", lambda directory: False)
    measured = measure_disk(tmp_path, 5 * MIB)
    assert not measured.is_direct
    assert measured.read_bytes_per_s > 0


def test_measure_disk_without_room_raises_before_it_writes(tmp_path: Path) -> None:
    free_bytes = read_disk(tmp_path).free_bytes
    with pytest.raises(ConfigError, match=f"measuring takes .*{tmp_path}|{tmp_path}: measuring"):
        measure_disk(tmp_path, free_bytes)


def test_measure_disk_that_fails_while_measured_raises_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "disk"
    directory.mkdir()

    def fail(descriptor: int, buffers: object, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StorageError, match="Input/output error"):
        measure_disk(directory, 5 * MIB)
    assert list(directory.iterdir()) == []


def test_measure_disk_of_a_short_read_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", lambda descriptor, buffers, offset: 7)
    with pytest.raises(StorageError, match=f"read 7 of {MIB} bytes"):
        measure_disk(tmp_path, 5 * MIB)


def test_measure_memcpy_of_a_buffer_returns_a_rate() -> None:
    assert measure_memcpy(4 * MIB) > 0


def test_measure_memory_read_of_a_buffer_returns_a_rate() -> None:
    assert measure_memory_read(torch.device("cpu"), 4 * MIB) > 0


def test_measure_link_to_the_cpu_is_that_of_a_copy() -> None:
    assert measure_link(torch.device("cpu"), 4 * MIB) > 0
