import errno
import os
from pathlib import Path

import pytest
import torch

from offload.cgroup import CgroupMemory
from offload.errors import ConfigError, StorageError
from offload.machine import (
    Disk,
    Gpu,
    Machine,
    Memory,
    accepts_direct_io,
    default_capacities,
    existing_parent,
    read_disk,
    read_gpus,
    survey,
    within_cgroup,
)

GIB = 1 << 30
ALL_TIERS = ("gpu", "cpu", "disk")


def make_machine(*, gpu_free: int | None = None, file_system: str = "ext4") -> Machine:
    """Return a machine with 16 GiB of memory and 100 GiB of disk free."""
    gpus = () if gpu_free is None else (Gpu(1, "H", 80 * GIB, gpu_free),)
    disk = Disk(Path("cache"), 200 * GIB, 100 * GIB, file_system)
    return Machine(Memory(32 * GIB, 16 * GIB, None), gpus, disk)


def test_survey_of_this_machine_is_consistent(tmp_path: Path) -> None:
    machine = survey(tmp_path)
    assert 0 < machine.memory.available_bytes <= machine.memory.total_bytes
    assert 0 < machine.disk.free_bytes <= machine.disk.total_bytes
    assert machine.disk.file_system != "unknown"
    assert len(machine.gpus) == torch.cuda.device_count()


def test_read_gpus_with_an_index_that_does_not_exist_says_how_many_there_are() -> None:
    count = torch.cuda.device_count()
    with pytest.raises(ConfigError, match=f"device {count} requested, {count} found"):
        read_gpus([count])


@pytest.mark.parametrize(
    ("cgroup", "memory"),
    [
        (None, Memory(32, 20, None)),
        (CgroupMemory(64, 60), Memory(32, 20, None)),
        (CgroupMemory(16, 10), Memory(16, 10, 16)),
        (CgroupMemory(30, 25), Memory(30, 20, 30)),
    ],
)
def test_memory_within_a_control_group_is_the_lesser(
    cgroup: CgroupMemory | None, memory: Memory
) -> None:
    assert within_cgroup(32, 20, cgroup) == memory


def test_disk_of_a_directory_not_made_yet_is_that_of_its_parent(tmp_path: Path) -> None:
    planned = read_disk(tmp_path / "not" / "yet")
    assert planned.directory == tmp_path / "not" / "yet"
    assert planned.file_system == read_disk(tmp_path).file_system
    assert not (tmp_path / "not").exists()


def test_existing_parent_below_a_file_raises_and_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file is a file"):
        existing_parent(tmp_path / "file" / "directory")


def test_direct_io_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    accepts_direct_io(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_direct_io_probe_where_no_file_can_be_made_raises(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="missing: No such file"):
        accepts_direct_io(tmp_path / "missing")


def _refuse_writes(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(descriptor: int, data: bytes, offset: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", refuse)


def test_direct_io_probe_where_the_file_system_refuses_is_false(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuse_writes(monkeypatch, errno.EINVAL)
    assert not accepts_direct_io(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_direct_io_probe_on_a_full_disk_raises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _refuse_writes(monkeypatch, errno.ENOSPC)
    with pytest.raises(StorageError, match="No space left"):
        accepts_direct_io(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_default_capacities_with_a_gpu_are_half_of_each_memory() -> None:
    capacities = default_capacities(make_machine(gpu_free=40 * GIB), ALL_TIERS, gpu=1)
    assert capacities == {"gpu": 20 * GIB, "cpu": 8 * GIB, "disk": 50 * GIB}


def test_default_capacities_without_a_gpu_divide_half_of_host_memory() -> None:
    capacities = default_capacities(make_machine(), ALL_TIERS)
    assert capacities == {"gpu": 2 * GIB, "cpu": 6 * GIB, "disk": 50 * GIB}


def test_default_capacities_with_the_disk_in_memory_divide_half_of_host_memory() -> None:
    capacities = default_capacities(make_machine(file_system="tmpfs"), ALL_TIERS)
    assert capacities == {"gpu": GIB, "cpu": 3 * GIB, "disk": 4 * GIB}


@pytest.mark.parametrize("tiers", [("gpu",), ("cpu",), ("gpu", "cpu"), ("gpu", "disk")])
@pytest.mark.parametrize("file_system", ["ext4", "tmpfs"])
def test_default_capacities_of_tiers_in_host_memory_are_half_of_it_together(
    tiers: tuple[str, ...], file_system: str
) -> None:
    capacities = default_capacities(make_machine(file_system=file_system), tiers)
    in_memory = [tier for tier in tiers if tier != "disk" or file_system == "tmpfs"]
    assert tuple(capacities) == tiers
    left = 8 * GIB - sum(capacities[tier] for tier in in_memory)
    assert 0 <= left < len(tiers) * 4096


def test_default_capacities_are_whole_pages() -> None:
    memory = Memory(10**9, 10**9 + 1, None)
    machine = Machine(memory, (), Disk(Path(), 10**9, 10**9 - 1, "ext4"))
    assert {size % 4096 for size in default_capacities(machine, ALL_TIERS).values()} == {0}


def test_default_capacities_of_an_unknown_tier_raise_and_list_the_known() -> None:
    with pytest.raises(ConfigError, match="unknown tier 'tape'; known: gpu, cpu, disk"):
        default_capacities(make_machine(), ["gpu", "tape"])


def test_default_capacities_on_a_gpu_that_is_not_there_raise() -> None:
    with pytest.raises(ConfigError, match="device 0 requested, known: 1"):
        default_capacities(make_machine(gpu_free=GIB), ALL_TIERS)
