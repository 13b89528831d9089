"""Indexes that lie on the disk are searched as in memory, and leave nothing there."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offload.errors import DiskFull, StorageError
from offload.index.base import Hits, KeyIndex
from offload.index.bounds import BoundsIndex
from offload.index.chunks import Chunking
from offload.index.residual import ResidualIndex
from offload.index.tree import TreeIndex
from offload.sparse.spill import spill
from offload.types import PAGE_BYTES
from tests.support.leaks import no_leaks
from tests.support.topic_keys import topic_keys, topic_queries

BUDGET = 60
LENGTHS = (512, 256, 100)

Build = Callable[[Tensor, Tensor], KeyIndex]


def builder(kind: type[KeyIndex], **options: Any) -> Build:
    return lambda keys, values: kind.build(keys, values, **options)


BUILDS: dict[str, Build] = {
    "tree": builder(TreeIndex, leaf_tokens=8),
    "tree of codes": builder(TreeIndex, leaf_tokens=8, num_levels=3, bits=8, patience=2),
    "bounds": builder(BoundsIndex),
    "residual": builder(ResidualIndex, tokens_per_cluster=8),
}

KEYS, TOPICS = topic_keys(2, sum(LENGTHS), 32)
VALUES = topic_keys(2, sum(LENGTHS), 32, seed=1)[0]
QUERIES = topic_queries(TOPICS, 3, 4) * 0.3


def make_parts(build: Build) -> list[KeyIndex]:
    runs = zip(KEYS.split(LENGTHS, 1), VALUES.split(LENGTHS, 1), strict=True)
    return [build(*run) for run in runs]


def join(parts: list[KeyIndex]) -> KeyIndex:
    return type(parts[0]).join(parts)


def check_equal(found: KeyIndex, expected: KeyIndex) -> None:
    """Tensors are the same, and a search that moves finds and estimates the same."""
    assert found.meta() == expected.meta()
    assert found.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name
    past: Hits | None = None
    other: Hits | None = None
    for query in QUERIES:
        past, other = (
            found.search(query, BUDGET, "max", past),
            expected.search(query, BUDGET, "max", other),
        )
        assert torch.equal(past.ids, other.ids)
        assert past.scanned_bytes == other.scanned_bytes
        have, none = past.found, VALUES[:, :0]
        tails = found.tail(query, past, have, none), expected.tail(query, other, have, none)
        assert (tails[0] is None) == (tails[1] is None)
        if tails[0] is not None and tails[1] is not None:
            assert torch.equal(tails[0].out, tails[1].out)
            assert torch.equal(tails[0].lse, tails[1].lse)


@pytest.mark.parametrize("kind", BUILDS)
def test_search_of_a_spilled_index_equals_that_of_the_one_in_memory(
    kind: str, tmp_path: Path
) -> None:
    index = join(make_parts(BUILDS[kind]))
    check_equal(spill(index, tmp_path), index)


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize("num_spilled", [1, 3])
def test_join_with_spilled_parts_equals_the_join_in_memory(
    num_spilled: int, kind: str, tmp_path: Path
) -> None:
    parts = make_parts(BUILDS[kind])
    mixed = [spill(part, tmp_path) for part in parts[:num_spilled]] + parts[num_spilled:]
    check_equal(spill(join(mixed), tmp_path), join(parts))


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize("num_parts", [1, 2])
def test_prefix_of_a_spilled_index_equals_the_join_of_the_first_parts(
    num_parts: int, kind: str, tmp_path: Path
) -> None:
    parts = make_parts(BUILDS[kind])
    first = join(parts[:num_parts])
    prefix = spill(join(parts), tmp_path).prefix(first.num_tokens)
    check_equal(prefix, first)
    check_equal(spill(prefix, tmp_path), first)


@pytest.mark.parametrize("kind", BUILDS)
def test_spilled_index_keeps_nothing_of_the_memory_it_came_from(kind: str, tmp_path: Path) -> None:
    index, again = (join(make_parts(BUILDS[kind])) for _ in range(2))
    spilled = spill(index, tmp_path)
    for tensor in index.tensors().values():
        tensor.zero_()
    check_equal(spilled, again)


@pytest.mark.parametrize("shape", [(2, 0, 32), (0, 3, 32), (2, 3, 0)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_tensors_without_elements_keep_their_shape_and_dtype(
    dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path
) -> None:
    full = torch.arange(192).view(2, 3, 32).to(dtype)
    kept = spill(BoundsIndex(torch.zeros(shape, dtype=dtype), full, Chunking(16, (48,))), tmp_path)
    assert (kept.lower.shape, kept.lower.dtype) == (shape, dtype)
    assert torch.equal(kept.upper, full)


@pytest.mark.leaks
def test_spilled_index_has_no_name_and_is_gone_with_its_last_reference(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir()
    index = join(make_parts(BUILDS["tree of codes"]))
    with no_leaks(folder):  # of descriptors
        spilled = spill(index, folder)
        assert list(folder.iterdir()) == []
        prefix = spilled.prefix(LENGTHS[0])
        del spilled
        check_equal(prefix, make_parts(BUILDS["tree of codes"])[0])
        del prefix


def test_all_of_the_file_is_allocated_before_it_is_mapped_in_pages_per_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []
    allocate = os.posix_fallocate

    def watch(fd: int, start: int, num_bytes: int) -> None:
        asked.append((start, num_bytes))
        allocate(fd, start, num_bytes)

    monkeypatch.setattr(os, "posix_fallocate", watch)
    index = BoundsIndex.build(KEYS[:, :64], VALUES[:, :64])
    check_equal(spill(index, tmp_path), index)
    assert asked == [(0, len(index.tensors()) * PAGE_BYTES)]


@pytest.mark.leaks
@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ENOSPC, DiskFull),
        (errno.EDQUOT, DiskFull),
        (errno.EFBIG, DiskFull),
        (errno.EIO, StorageError),
    ],
)
def test_disk_that_has_no_room_refuses_an_index_and_keeps_nothing_of_it(
    number: int, kind: type[StorageError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int, start: int, num_bytes: int) -> None:
        raise OSError(number, os.strerror(number))

    folder = tmp_path / "disk"
    folder.mkdir()
    index = join(make_parts(BUILDS["residual"]))
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(StorageError, match=r"\d+ bytes of an index to") as caught:
        spill(index, folder)
    assert type(caught.value) is kind
    assert caught.value.errno == number
    assert list(folder.iterdir()) == []
    check_equal(index, join(make_parts(BUILDS["residual"])))


def test_folder_that_is_missing_is_a_storage_error_that_names_it(tmp_path: Path) -> None:
    index = BoundsIndex.build(KEYS, VALUES)
    with pytest.raises(StorageError, match=r"index to .*missing: No such file") as caught:
        spill(index, tmp_path / "missing")
    assert caught.value.errno == errno.ENOENT
