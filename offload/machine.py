"""What this machine offers, and the capacities that follow. For its speed see ``bandwidth``."""

import errno
import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
import torch

from offload.cgroup import CgroupMemory, read_cgroup_memory
from offload.errors import ConfigError, StorageError
from offload.types import PAGE_BYTES

_IN_MEMORY: Final = frozenset({"tmpfs", "ramfs"})

_RAM_SHARES: Final = {"gpu": 1, "cpu": 3, "disk": 4}
"""How tiers that live in host memory divide it. The faster tier is the smaller one, as on a machine
where it is another kind of memory; ``gpu`` is here for machines without an accelerator, ``disk``
for directories on a file system in memory."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Host memory that this process may use.

    Attributes
    ----------
    total_bytes, available_bytes : int
        The machine's or the control group's, whichever is less.
    cgroup_limit_bytes : int or None
        The control group's limit, if it has one.
    """

    total_bytes: int
    available_bytes: int
    cgroup_limit_bytes: int | None


@dataclass(frozen=True, slots=True)
class Gpu:
    """One CUDA device: its index in torch, its name, and its memory."""

    index: int
    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class Disk:
    """The file system below a directory.

    Attributes
    ----------
    directory : Path
        The directory that was asked about; it need not exist yet.
    total_bytes, free_bytes : int
        ``free_bytes`` is what an ordinary user may still write.
    file_system : str
        Its type as the system names it (``ext4``, ``tmpfs``), or ``unknown``.
    """

    directory: Path
    total_bytes: int
    free_bytes: int
    file_system: str

    @property
    def is_in_memory(self) -> bool:
        """Whether files here take host memory."""
        return self.file_system in _IN_MEMORY


@dataclass(frozen=True, slots=True)
class Machine:
    """Everything that decides how large the tiers may be."""

    memory: Memory
    gpus: tuple[Gpu, ...]
    disk: Disk


def survey(directory: Path, gpus: Sequence[int] | None = None) -> Machine:
    """Look at this machine now. Writes nothing.

    Parameters
    ----------
    directory : Path
        Where the disk tier would keep its files; it need not exist yet.
    gpus : sequence of int, optional
        Which CUDA devices to look at; all by default. Looking at one creates a context on it,
        which takes some of its memory.

    Raises
    ------
    ConfigError
        A part of the path is a file, or there is no such CUDA device.
    """
    return Machine(read_memory(), read_gpus(gpus), read_disk(directory))


def read_memory() -> Memory:
    """Read host memory, within the limit of the control group."""
    physical = psutil.virtual_memory()
    return within_cgroup(int(physical.total), int(physical.available), read_cgroup_memory())


def within_cgroup(total_bytes: int, available_bytes: int, cgroup: CgroupMemory | None) -> Memory:
    """Combine what the machine has with what the control group leaves of it."""
    if cgroup is None or cgroup.limit_bytes >= total_bytes:
        return Memory(total_bytes, available_bytes, None)
    return Memory(
        cgroup.limit_bytes, min(available_bytes, cgroup.available_bytes), cgroup.limit_bytes
    )


def read_gpus(indices: Sequence[int] | None = None) -> tuple[Gpu, ...]:
    """Read the CUDA devices with these indices, or every one that torch sees."""
    num_gpus = torch.cuda.device_count()
    gpus = []
    for index in range(num_gpus) if indices is None else indices:
        if not 0 <= index < num_gpus:
            raise ConfigError(f"CUDA device {index} requested, {num_gpus} found")
        free_bytes, total_bytes = torch.cuda.mem_get_info(index)
        gpus.append(Gpu(index, torch.cuda.get_device_name(index), total_bytes, free_bytes))
    return tuple(gpus)


def read_disk(directory: Path) -> Disk:
    """Read the file system that holds a directory, or will hold it once it is made."""
    existing = existing_parent(directory)
    usage = psutil.disk_usage(str(existing))
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    resolved = existing.resolve()
    types = (mounts[parent] for parent in (resolved, *resolved.parents) if parent in mounts)
    return Disk(directory, int(usage.total), int(usage.free), next(types, "unknown"))


def existing_parent(directory: Path) -> Path:
    """Return the directory itself, or the nearest one above it that exists."""
    absolute = directory.absolute()
    existing = next(parent for parent in (absolute, *absolute.parents) if parent.exists())
    if not existing.is_dir():
        raise ConfigError(f"{directory} cannot be a directory: {existing} is a file")
    return existing


def accepts_direct_io(directory: Path) -> bool:
    """Try whether a file in an existing directory can be written past the page cache.

    Raises
    ------
    ConfigError
        No file can be made in the directory.
    StorageError
        The file was made, but the disk refused a page for another reason, such as lack of space.
    """
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        descriptor, name = tempfile.mkstemp(prefix="offload-probe-", dir=directory)
    except OSError as error:
        raise ConfigError(f"cannot write in {directory}: {error.strerror}") from error
    os.close(descriptor)
    try:
        _write_page_directly(name)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTSUP):
            return False
        raise StorageError(f"{directory}: cannot write a page: {error.strerror}") from error
    finally:
        os.unlink(name)
    return True


def _write_page_directly(name: str) -> None:
    descriptor = os.open(name, os.O_WRONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, PAGE_BYTES) as page:
            os.pwrite(descriptor, page, 0)
    finally:
        os.close(descriptor)


def default_capacities(machine: Machine, tiers: Sequence[str], gpu: int = 0) -> dict[str, int]:
    """Choose how many bytes each tier may hold: never more than half of what is free.

    Each kind of memory gives half of what it has free to the tiers that live in it. That is one
    tier each on a machine with an accelerator and a real disk. Where several tiers share host
    memory (``gpu`` without an accelerator, ``cpu``, ``disk`` on a file system in memory), they
    divide its half 1 : 3 : 4.

    Parameters
    ----------
    machine : Machine
    tiers : sequence of {"gpu", "cpu", "disk"}
    gpu : int
        Which CUDA device the ``gpu`` tier is on. Ignored where there is none.

    Returns
    -------
    dict of str to int
        Tier name to bytes, whole pages.

    Raises
    ------
    ConfigError
        Unknown tier, or no such CUDA device.
    """
    unknown = [tier for tier in tiers if tier not in _RAM_SHARES]
    if unknown:
        raise ConfigError(f"unknown tier {unknown[0]!r}; known: {', '.join(_RAM_SHARES)}")
    in_ram = {"cpu"}
    free_bytes = {"disk": machine.disk.free_bytes}
    if machine.gpus:
        free_bytes["gpu"] = _gpu(machine, gpu).free_bytes
    else:
        in_ram.add("gpu")
    if machine.disk.is_in_memory:
        in_ram.add("disk")
    shares = {tier: _RAM_SHARES[tier] for tier in tiers if tier in in_ram}
    for tier, share in shares.items():
        free_in_ram = machine.memory.available_bytes * share // sum(shares.values())
        free_bytes[tier] = min(free_in_ram, free_bytes.get(tier, free_in_ram))
    return {tier: free_bytes[tier] // 2 // PAGE_BYTES * PAGE_BYTES for tier in tiers}


def _gpu(machine: Machine, index: int) -> Gpu:
    for gpu in machine.gpus:
        if gpu.index == index:
            return gpu
    known = ", ".join(str(gpu.index) for gpu in machine.gpus)
    raise ConfigError(f"CUDA device {index} requested, known: {known}")
