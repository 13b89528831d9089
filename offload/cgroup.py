"""How much memory the control groups of Linux leave to this process. Reads files, nothing else."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class CgroupMemory:
    """The tightest limit on this process's memory.

    Attributes
    ----------
    limit_bytes : int
        What the group and its descendants may use together.
    available_bytes : int
        What is left of it, page cache that would be given back included. Never negative.
    """

    limit_bytes: int
    available_bytes: int


@dataclass(frozen=True, slots=True)
class _Files:
    limit: str
    usage: str
    reclaimable: str


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def read_cgroup_memory(
    cgroup_root: Path = Path("/sys/fs/cgroup"),
    membership: Path = Path("/proc/self/cgroup"),
) -> CgroupMemory | None:
    """Find the tightest memory limit among this process's groups and their ancestors.

    Versions 1 and 2, and both at once, are understood.

    Parameters
    ----------
    cgroup_root : Path
        Where the control group file systems are mounted.
    membership : Path
        The file that names this process's group in each hierarchy.

    Returns
    -------
    CgroupMemory or None
        None where there are no control groups, or no limit.
    """
    if not membership.is_file():
        return None
    limits = []
    for line in membership.read_text().splitlines():
        number, controllers, group = line.split(":", 2)
        if number == "0":
            for mount in (cgroup_root, cgroup_root / "unified"):
                limits += _limits_above(mount, group, _V2)
        elif "memory" in controllers.split(","):
            limits += _limits_above(cgroup_root / "memory", group, _V1)
    if not limits:
        return None
    return CgroupMemory(
        limit_bytes=min(limit.limit_bytes for limit in limits),
        available_bytes=min(limit.available_bytes for limit in limits),
    )


def _limits_above(mount: Path, group: str, files: _Files) -> list[CgroupMemory]:
    folder = mount / group.lstrip("/")
    # In a container the path is often the host's, while the mount shows the container's own group.
    folders = [folder, *folder.parents]
    inside = [folder for folder in folders if folder.is_relative_to(mount)]
    return [limit for folder in inside if (limit := _read_limit(folder, files)) is not None]


def _read_limit(folder: Path, files: _Files) -> CgroupMemory | None:
    limit_file = folder / files.limit
    if not limit_file.is_file():
        return None
    text = limit_file.read_text().strip()
    # Version 1 has no word for "no limit": it shows the largest number of whole pages.
    if text == "max" or int(text) >= 1 << 60:
        return None
    usage = int((folder / files.usage).read_text()) - _reclaimable(folder, files)
    return CgroupMemory(int(text), max(0, int(text) - usage))


def _reclaimable(folder: Path, files: _Files) -> int:
    for line in (folder / "memory.stat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name == files.reclaimable:
            return int(value)
    return 0
