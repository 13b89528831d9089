"""Which tiers a cache gets, and how large they are. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from offload.bench.settings import BenchSettings, Cell

_SLACK: Final = 1.25
_BESIDE_BYTES: Final = 128 << 20
"""Tails, staging and write buffers, where a tier is to be large enough for everything."""

_WORKING_BYTES: Final = 1 << 20
"""What tails and staging take at least: of small contexts more than a quarter."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Tiers, fastest first, and their capacities in bytes (or as the user wrote them)."""

    capacity: dict[str, int | str]

    @property
    def tiers(self) -> Sequence[str]:
        """Names of the tiers."""
        return tuple(self.capacity)

    @property
    def has_disk(self) -> bool:
        """Whether there is a disk tier."""
        return "disk" in self.capacity


def place(settings: BenchSettings, cell: Cell, *, has_device: bool) -> Placement:
    """Choose tiers for a cell.

    Without a CUDA device all is host memory: the ``gpu`` tier holds everything, or a quarter of the
    share that the cell gives and the ``cpu`` tier, where rows from the disk are kept, the others.
    With one, it holds ``device_share``, and the host the rest or its own share.
    """
    if settings.capacity:
        return Placement(dict(settings.capacity))
    kv_bytes = settings.kv_bytes(cell)
    everything = int(_SLACK * kv_bytes) + _BESIDE_BYTES
    limited = None if cell.ram_share is None else int(cell.ram_share * kv_bytes)
    sizes: dict[str, int | str] = {}
    if has_device:
        sizes["gpu"] = int(settings.device_share * kv_bytes)
        sizes["cpu"] = everything if limited is None else limited
    elif limited is None:
        sizes["gpu"] = everything
    else:
        working = max(limited // 4, min(limited // 2, _WORKING_BYTES))
        sizes |= {"gpu": working, "cpu": limited - working}
    if limited is not None:
        sizes["disk"] = everything
    return Placement(sizes)


def streaming(settings: BenchSettings, cell: Cell) -> Placement:
    """Return what reads chunks from disk at every step: all but the share that the cell gives.

    Keys may lie there twice, and the file system is not asked for more than is used.
    """
    kv_bytes = settings.kv_bytes(cell)
    disk_bytes = int(2 * kv_bytes) + _BESIDE_BYTES
    if cell.ram_share is None:
        return Placement({"disk": disk_bytes})
    return Placement({"cpu": int(cell.ram_share * kv_bytes), "disk": disk_bytes})


def near_storage(settings: BenchSettings, cell: Cell) -> Placement:
    """Return what keeps nothing in memory but what storage-side workers do."""
    return Placement({"disk": int(2 * settings.kv_bytes(cell)) + _BESIDE_BYTES})
