"""Machine code that numba keeps goes when any source of the kernels is newer."""

import os
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from offload.kernels import dispatch, kept_code

pytest.importorskip("numba")

SOURCES = list(Path(kept_code.__file__).parent.glob("cpu_*.py"))


def kernels_kept_in(folder: Path | None) -> ModuleType:
    module = ModuleType("kernels")
    vars(module)["kernel"] = SimpleNamespace(stats=SimpleNamespace(cache_path=folder))
    return module


def test_only_kernels_that_are_older_than_a_source_are_removed(tmp_path: Path) -> None:
    newest = max(source.stat().st_mtime for source in SOURCES)
    ages = {"cpu_a.f-1.py311.nbi": -1, "cpu_a.f-1.py311.1.nbc": -1, "cpu_b.g-1.py311.nbi": 1}
    others = {"cpu_a.cpython-311.pyc": -1, "theirs.f-1.py311.nbi": -1}
    for name, age in (ages | others).items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (newest + age, newest + age))
    kept_code.remove_stale(kernels_kept_in(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"cpu_b.g-1.py311.nbi", *others}


def test_kernels_that_are_not_kept_or_whose_folder_is_gone_are_no_error(tmp_path: Path) -> None:
    kept_code.remove_stale(kernels_kept_in(None))
    kept_code.remove_stale(kernels_kept_in(tmp_path / "gone"))


def test_kernels_say_where_they_are_kept() -> None:
    module = dispatch.compiled("cpu_xxh3")
    assert module is not None
    assert any(getattr(each, "stats", None) is not None for each in vars(module).values())
