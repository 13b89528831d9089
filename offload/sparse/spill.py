"""Indexes that lie on the disk: mapped into memory, so that the kernel keeps of them what fits."""

import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from offload.index.base import KeyIndex
from offload.tiers.syscalls import as_storage_error, open_nameless
from offload.types import PAGE_BYTES, round_up

Index = TypeVar("Index", bound=KeyIndex)


def spill(index: Index, directory: Path) -> Index:
    """Return an index whose tensors lie in a file that is gone with it.

    The pages that searches look at are read when they do and stay in the page cache while there is
    memory; they are nobody's to count. They are not verified: a bit that the disk has flipped can
    make a search find worse tokens, but the keys and values that are then read are verified.

    Parameters
    ----------
    index : KeyIndex
        On the host.
    directory : Path
        On the disk that is to hold it. The file has no name there, and goes with the process.

    Raises
    ------
    StorageError, DiskFull
        The file cannot be written; the index is as it was.
    """
    tensors = {name: tensor.contiguous() for name, tensor in index.tensors().items()}
    sizes = {name: round_up(max(1, tensor.nbytes)) for name, tensor in tensors.items()}
    try:
        fd = open_nameless(directory)
        try:
            mapped = _write_and_map(fd, tensors, sizes)
        finally:
            os.close(fd)
    except OSError as error:
        num_bytes = sum(sizes.values())
        raise as_storage_error(error, f"{num_bytes} bytes of an index to {directory}") from error
    return type(index).restore(mapped, index.meta())


def _write_and_map(
    fd: int, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> dict[str, Tensor]:
    total = sum(sizes.values())
    os.posix_fallocate(fd, 0, total)  # else a full disk is a fault of the first read
    memory = torch.frombuffer(mmap.mmap(fd, total, mmap.MAP_SHARED), dtype=torch.uint8)
    assert memory.data_ptr() % PAGE_BYTES == 0
    mapped, start = {}, 0
    for name, tensor in tensors.items():
        place = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        mapped[name] = place.copy_(tensor)
        start += sizes[name]
    return mapped
