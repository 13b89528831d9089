"""Signs of 32 coordinates per vector, laid out for sums over vectors instead of inner products."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from offload.kernels.codes import BLOCK_PLACES

NUM_SIGNS = 32


def pack_signs(positive: Tensor) -> Tensor:
    """Return signs in blocks of 16 vectors.

    Parameters
    ----------
    positive : Tensor, bool or uint8 [num_heads, num_vectors, 32]

    Returns
    -------
    Tensor, uint8 [num_heads, num_blocks, 16, 4]
        Bit ``k`` of byte ``(lane, i)`` of a block is coordinate ``lane + 16 * (k % 2)`` of its
        vector ``4 * (k // 2) + i``.
    """
    rows = pad(positive.to(torch.uint8), (0, 0, 0, -positive.shape[1] % BLOCK_PLACES))
    grid = rows.view(len(rows), -1, 4, 4, 2, 16).permute(0, 1, 5, 3, 2, 4).flatten(4)
    packed = grid[..., 0].clone()
    for plane in range(1, 8):
        packed |= grid[..., plane] << plane
    return packed


def unpack_signs(bits: Tensor) -> Tensor:
    """Return the signs, -1 or 1, float32 ``[num_heads, 16 * num_blocks, 32]``."""
    planes = torch.arange(8, device=bits.device).to(torch.uint8)
    grid = (bits.unsqueeze(-1) >> planes & 1).unflatten(4, (4, 2)).permute(0, 1, 4, 3, 5, 2)
    signs: Tensor = grid.reshape(len(bits), -1, NUM_SIGNS) * 2.0 - 1.0
    return signs


def signs_at(blocks: Tensor, lanes: Tensor) -> Tensor:
    """Return the signs of single vectors.

    Parameters
    ----------
    blocks : Tensor, uint8 [num_vectors, 16, 4]
        The block that each vector is in.
    lanes : Tensor, int64 [num_vectors]
        Its number there.

    Returns
    -------
    Tensor, shape (num_vectors, 32), float32
    """
    column = lanes.remainder(4).view(-1, 1, 1).expand(-1, 16, 1)
    packed = blocks.gather(2, column).squeeze(2)
    planes = (lanes.div(4, rounding_mode="floor") * 2).unsqueeze(1).to(torch.uint8)
    low, high = packed >> planes & 1, packed >> planes + 1 & 1
    return torch.cat([low, high], 1) * 2.0 - 1.0
