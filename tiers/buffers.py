"""Host memory that parts of records are read into."""

import ctypes
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Ints = NDArray[np.int64]


class Buffer(NamedTuple):
    """One piece of memory.

    Attributes
    ----------
    address : int
    bytes : memoryview
        Contiguous.
    """

    address: int
    bytes: memoryview

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return len(self.bytes)

    def part(self, start: int, num_bytes: int) -> "Buffer":
        """Return a piece of it."""
        return Buffer(self.address + start, self.bytes[start : start + num_bytes])

    @classmethod
    def of(cls, tensor: Tensor) -> "Buffer":
        """Return the memory of a contiguous ``uint8`` tensor, which must outlive it."""
        return cls(tensor.data_ptr(), tensor.numpy().data)


class Buffers:
    """Pieces of memory of one size, by address: hundreds of them are handed on at no cost.

    Parameters
    ----------
    addresses : ndarray, int64 [n]
    nbytes : int
        Of each.
    memory : object
        What they lie in, kept alive.
    """

    def __init__(self, addresses: Ints, nbytes: int, memory: object) -> None:
        self.addresses = addresses
        self.nbytes = nbytes
        self._memory = memory

    @classmethod
    def of(cls, out: "Sequence[Tensor] | Buffers") -> "Buffers":
        """Return contiguous ``uint8`` tensors of one size as buffers; buffers as they are."""
        if isinstance(out, Buffers):
            return out
        addresses = np.array([tensor.data_ptr() for tensor in out], np.int64)
        return cls(addresses, out[0].nbytes if len(out) else 0, out)

    def __len__(self) -> int:
        return len(self.addresses)

    def __iter__(self) -> Iterator[Buffer]:
        kind = ctypes.c_char * self.nbytes
        for address in self.addresses.tolist():
            yield Buffer(address, memoryview(kind.from_address(address)).cast("B"))

    def some(self, which: "Ints | slice") -> "Buffers":
        """Return some of them."""
        return Buffers(self.addresses[which], self.nbytes, self._memory)
