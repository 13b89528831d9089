"""Values of a segment as their cluster's mean plus a residual in one bit per direction.

Only the directions in which the residuals vary most are coded, so a token costs six bytes where its
value has 256; attention sums them before it leaves these directions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from offload.kernels.codes import BLOCK_PLACES, quantise, rotation
from offload.kernels.sign_planes import NUM_SIGNS, pack_signs, unpack_signs


class ValueCodes(NamedTuple):
    """Coded residuals of the values of consecutive segments.

    Attributes
    ----------
    bits : Tensor, uint8 [num_heads, num_places / 16, 16, 4]
        One bit per direction, see ``pack_signs``.
    scale : Tensor, bfloat16 [num_heads, num_places]
    basis : Tensor, float16 [num_heads, num_segments, 32, value_dim]
        The directions in each segment, orthonormal; zero where values have fewer dimensions.
    """

    bits: Tensor
    scale: Tensor
    basis: Tensor

    def prefix(self, num_places: int, num_segments: int) -> "ValueCodes":
        """Return the codes of the first segments, which have so many places."""
        return ValueCodes(
            self.bits[:, : num_places // BLOCK_PLACES],
            self.scale[:, :num_places],
            self.basis[:, :num_segments],
        )

    def decode(self) -> Tensor:
        """Return the residuals of a single segment, ``[num_heads, num_places, value_dim]``."""
        along = unpack_signs(self.bits) * self.scale.float().unsqueeze(-1)
        return torch.bmm(along, self.basis.float().squeeze(1))


def code_values(residuals: Tensor) -> ValueCodes:
    """Code the residuals of one segment.

    Parameters
    ----------
    residuals : Tensor, shape (num_heads, num_tokens, value_dim), float32
    """
    basis = _widest(residuals).to(torch.float16)
    numbers, scale = quantise(torch.bmm(residuals, basis.float().mT), 1, unbiased=False)
    missing = NUM_SIGNS - basis.shape[1]
    return ValueCodes(
        pack_signs(pad(numbers, (0, missing))),
        pad(scale / 2, (0, -scale.shape[1] % BLOCK_PLACES)),
        pad(basis, (0, 0, 0, missing)).unsqueeze(1),
    )


def join_values(parts: Sequence[ValueCodes]) -> ValueCodes:
    """Return the coded values of consecutive runs as one."""
    return ValueCodes(*(torch.cat(tensors, 1) for tensors in zip(*parts, strict=True)))


def _widest(residuals: Tensor) -> Tensor:
    """Return the directions in which residuals vary most, mixed at random so that all matter."""
    covariance = torch.bmm(residuals.mT, residuals)
    dims = min(NUM_SIGNS, residuals.shape[-1])
    directions: Tensor = torch.linalg.eigh(covariance)[1][..., -dims:].mT
    return rotation(dims).to(residuals.device) @ directions
