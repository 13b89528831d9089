from pathlib import Path

import pytest

from offload.cgroup import CgroupMemory, read_cgroup_memory

GIB = 1 << 30
NO_LIMIT_V1 = "9223372036854771712"


def _group_v1(folder: Path, limit: int | str, usage: int = 0, inactive_file: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{usage}\n")
    # `inactive_file` without the prefix is this group alone, without its descendants.
    (folder / "memory.stat").write_text(f"inactive_file 1\ntotal_inactive_file {inactive_file}\n")


def _group_v2(folder: Path, limit: int | str, usage: int = 0, inactive_file: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {inactive_file}\nactive_file 7\n")


def _read(root: Path, membership: str) -> CgroupMemory | None:
    file = root / "membership"
    file.write_text(membership)
    return read_cgroup_memory(root, file)


def test_cgroup_memory_without_control_groups_is_none(tmp_path: Path) -> None:
    assert read_cgroup_memory(tmp_path, tmp_path / "missing") is None


def test_cgroup_memory_v2_without_a_limit_is_none(tmp_path: Path) -> None:
    _group_v2(tmp_path / "app", "max", usage=GIB)
    assert _read(tmp_path, "0::/app\n") is None


def test_cgroup_memory_v1_without_a_limit_is_none(tmp_path: Path) -> None:
    _group_v1(tmp_path / "memory" / "app", NO_LIMIT_V1, usage=GIB)
    assert _read(tmp_path, "4:memory:/app\n") is None


def test_cgroup_memory_v2_counts_page_cache_as_available(tmp_path: Path) -> None:
    _group_v2(tmp_path / "app", 8 * GIB, usage=5 * GIB, inactive_file=2 * GIB)
    assert _read(tmp_path, "0::/app\n") == CgroupMemory(8 * GIB, 5 * GIB)


def test_cgroup_memory_v1_counts_page_cache_as_available(tmp_path: Path) -> None:
    _group_v1(tmp_path / "memory" / "app", 8 * GIB, usage=5 * GIB, inactive_file=2 * GIB)
    membership = "9:name=systemd:/\n4:cpu,memory:/app\n3:cpuset:/\n"
    assert _read(tmp_path, membership) == CgroupMemory(8 * GIB, 5 * GIB)


def test_cgroup_memory_under_a_tighter_ancestor_is_the_ancestors(tmp_path: Path) -> None:
    _group_v2(tmp_path / "slice", 4 * GIB, usage=3 * GIB)
    _group_v2(tmp_path / "slice" / "app", 8 * GIB, usage=GIB)
    assert _read(tmp_path, "0::/slice/app\n") == CgroupMemory(4 * GIB, GIB)


def test_cgroup_memory_with_limit_and_usage_at_two_levels_takes_the_least_of_each(
    tmp_path: Path,
) -> None:
    _group_v2(tmp_path / "slice", 8 * GIB, usage=8 * GIB - 1)
    _group_v2(tmp_path / "slice" / "app", 4 * GIB, usage=GIB)
    assert _read(tmp_path, "0::/slice/app\n") == CgroupMemory(4 * GIB, 1)


@pytest.mark.parametrize("mount", [".", "unified"])
def test_cgroup_memory_in_a_container_that_sees_the_host_path_is_the_mounts(
    mount: str, tmp_path: Path
) -> None:
    _group_v2(tmp_path / mount, 2 * GIB, usage=GIB)
    assert _read(tmp_path, "0::/docker/0123abcd\n") == CgroupMemory(2 * GIB, GIB)


def test_cgroup_memory_of_both_versions_is_the_tighter(tmp_path: Path) -> None:
    _group_v1(tmp_path / "memory" / "app", 3 * GIB)
    _group_v2(tmp_path / "unified" / "app", 2 * GIB)
    assert _read(tmp_path, "4:memory:/app\n0::/app\n") == CgroupMemory(2 * GIB, 2 * GIB)


def test_cgroup_memory_used_beyond_the_limit_leaves_nothing(tmp_path: Path) -> None:
    _group_v2(tmp_path / "app", GIB, usage=2 * GIB)
    assert _read(tmp_path, "0::/app\n") == CgroupMemory(GIB, 0)
