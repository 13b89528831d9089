"""Values of a segment as their cluster's mean plus a residual in one bit per direction.

Only the directions in which the residuals vary most are coded, so a token costs six bytes where its
value has 256; attention sums them before it leaves these directions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from offload.kernels.codes import Codes, decode, encode, rotation

VALUE_DIMS = 32
"""Directions that are coded."""


class ValueCodes(NamedTuple):
    """Coded residuals of the values of consecutive segments.

    Attributes
    ----------
    codes : Codes
        One bit per direction; ``bits`` [num_heads, num_tokens, num_bytes].
    basis : Tensor, float16 [num_heads, num_segments, num_directions, value_dim]
        The directions in each segment, orthonormal.
    """

    codes: Codes
    basis: Tensor

    def prefix(self, num_tokens: int, num_segments: int) -> "ValueCodes":
        """Return the codes of the first segments, which have so many tokens."""
        return ValueCodes(prefix_codes(self.codes, num_tokens), self.basis[:, :num_segments])

    def sum(self, weights: Tensor, segments: Sequence[int]) -> Tensor:
        """Return the weighted sum of the residuals, ``[num_heads, num_queries, value_dim]``.

        Parameters
        ----------
        weights : Tensor, shape (num_heads, num_queries, num_tokens), float32
        segments : sequence of int
            Tokens of each.
        """
        along = decode(self.codes, 1, self.basis.shape[2]).split(list(segments), 1)
        pairs = zip(weights.split(list(segments), 2), along, strict=True)
        sums = [torch.bmm(weight, rows) for weight, rows in pairs]
        return torch.cat(sums, 2) @ self.basis.float().flatten(1, 2)

    def decode(self) -> Tensor:
        """Return the residuals of a single segment, ``[num_heads, num_tokens, value_dim]``."""
        along = decode(self.codes, 1, self.basis.shape[2])
        return torch.bmm(along, self.basis.float().squeeze(1))


def code_values(residuals: Tensor) -> ValueCodes:
    """Code the residuals of one segment.

    Parameters
    ----------
    residuals : Tensor, shape (num_heads, num_tokens, value_dim), float32
    """
    basis = _widest(residuals).to(torch.float16)
    codes = encode(torch.bmm(residuals, basis.float().mT), 1, unbiased=False)
    return ValueCodes(codes, basis.unsqueeze(1))


def join_codes(parts: Sequence[Codes]) -> Codes:
    """Return the codes of consecutive runs as one."""
    return Codes(torch.cat([p.bits for p in parts], 1), torch.cat([p.scale for p in parts], 1))


def prefix_codes(codes: Codes, num_tokens: int) -> Codes:
    """Return the codes of the first tokens."""
    return Codes(codes.bits[:, :num_tokens], codes.scale[:, :num_tokens])


def join_values(parts: Sequence[ValueCodes]) -> ValueCodes:
    """Return the coded values of consecutive runs as one."""
    basis = torch.cat([part.basis for part in parts], 1)
    return ValueCodes(join_codes([part.codes for part in parts]), basis)


def _widest(residuals: Tensor) -> Tensor:
    """Return the directions in which residuals vary most, mixed at random so that all matter."""
    covariance = torch.bmm(residuals.mT, residuals)
    dims = min(VALUE_DIMS, residuals.shape[-1])
    directions: Tensor = torch.linalg.eigh(covariance)[1][..., -dims:].mT
    return rotation(dims).to(residuals.device) @ directions
