"""The contract of a codec: rows of one KV head in, fewer bytes out.

A record on disk holds *units*: consecutive tokens of one KV head, encoded and verified by
themselves, so that one can be read without the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Unit:
    """Shape and dtype of what is encoded together: ``[num_tokens, key_dim + value_dim]``.

    Attributes
    ----------
    num_tokens, key_dim, value_dim : int
    dtype : torch.dtype
    """

    num_tokens: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """``(num_tokens, key_dim + value_dim)``."""
        return (self.num_tokens, self.key_dim + self.value_dim)

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows as they are."""
        return self.num_tokens * (self.key_dim + self.value_dim) * self.dtype.itemsize


class Codec(Protocol):
    """Encodes units. Stateless: any thread may call any method.

    Attributes
    ----------
    name : str
    number : int
        Stands for the codec and all its parameters in the header of a record; never used again for
        anything else. 0 is ``raw``.
    is_lossless : bool
        Whether every bit comes back, those of NaN included.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def number(self) -> int: ...  # noqa: D102
    @property
    def is_lossless(self) -> bool: ...  # noqa: D102

    def max_bytes(self, unit: Unit) -> int:
        """Return the most bytes that a unit becomes; of codecs of fixed rate, what it does become.

        Raises
        ------
        ConfigError
            The codec cannot encode units of this shape or dtype.
        """
        ...

    def encode(self, rows: Tensor, unit: Unit) -> list[bytes]:
        """Return each unit's bytes.

        Parameters
        ----------
        rows : Tensor, shape (num_units, num_tokens, key_dim + value_dim)
            On the host, contiguous, of the unit's dtype.
        unit : Unit

        Returns
        -------
        list of bytes
            By themselves enough for ``decode``; at least one byte each.
        """
        ...

    def decode(self, payloads: Sequence[memoryview], unit: Unit, out: Tensor) -> None:
        """Undo ``encode``.

        Parameters
        ----------
        payloads : sequence of memoryview
            What ``encode`` gave; their checksums were verified.
        unit : Unit
        out : Tensor, shape (num_units, num_tokens, key_dim + value_dim)
            Filled.

        Raises
        ------
        CorruptChunk
            A payload is nothing that this codec writes.
        """
        ...
