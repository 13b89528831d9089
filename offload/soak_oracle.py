"""What a cache must hold and answer: plain tensors, and attention over them in float64."""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from offload.types import ChunkLayout


@dataclass(frozen=True, slots=True)
class PlainCache:
    """Keys and values of every layer in plain tensors. Immutable, so a fork is the same object.

    Attributes
    ----------
    keys, values : tuple of Tensor
        Of each layer, ``[batch, num_kv_heads, num_tokens, dim]``.
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @classmethod
    def draw(
        cls,
        layout: ChunkLayout,
        num_layers: int,
        batch: int,
        num_tokens: int,
        generator: torch.Generator,
    ) -> Self:
        """Return normal random numbers in the shape of a layout."""
        rows = (batch, layout.num_kv_heads, num_tokens)
        keys, values = (
            [torch.randn((*rows, dim), generator=generator) for _ in range(num_layers)]
            for dim in (layout.key_dim, layout.value_dim)
        )
        return cls(tuple(keys), tuple(values))

    @property
    def batch(self) -> int:
        """Rows."""
        return self.keys[0].shape[0]

    @property
    def num_tokens(self) -> int:
        """Tokens per row."""
        return self.keys[0].shape[2]

    def extended(self, new: Self) -> "PlainCache":
        """Return what is held after the tokens of ``new`` were appended."""
        return PlainCache(_join(self.keys, new.keys), _join(self.values, new.values))

    def cropped(self, num_tokens: int) -> "PlainCache":
        """Return what is held after all but the first tokens were dropped."""
        return PlainCache(
            tuple(keys[:, :, :num_tokens] for keys in self.keys),
            tuple(values[:, :, :num_tokens] for values in self.values),
        )

    def attend(self, layer: int, query: Tensor, scale: float) -> Tensor:
        """Attend causally with the last tokens as queries.

        Parameters
        ----------
        layer : int
        query : Tensor, shape (batch, num_heads, num_queries, dim)
        scale : float

        Returns
        -------
        Tensor, shape (batch, num_queries, num_heads, dim), float64
        """
        group = query.shape[1] // self.keys[layer].shape[1]
        keys, values = (
            x[layer].double().repeat_interleave(group, 1) for x in (self.keys, self.values)
        )
        positions = torch.arange(self.num_tokens)
        hidden = positions > positions[-query.shape[2] :, None]
        scores = query.double() @ keys.transpose(-1, -2) * scale
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        return (weights @ values).transpose(1, 2)

    def chunk(self, layer: int, row: int, position: int, chunk_tokens: int) -> Tensor:
        """Return one full chunk as a tier holds it, ``[num_kv_heads, chunk_tokens, row_dim]``."""
        tokens = slice(position * chunk_tokens, (position + 1) * chunk_tokens)
        return torch.cat([self.keys[layer][row, :, tokens], self.values[layer][row, :, tokens]], -1)


def _join(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(pair, 2) for pair in zip(first, second, strict=True))
