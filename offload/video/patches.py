"""Frames as the vision towers of Qwen want them: of fitting size, and cut into patches."""

import math

from torch import Tensor

from offload.errors import ConfigError

_LONGEST_TO_SHORTEST = 200
"""Qwen's own limit; beyond it a picture is one row of patches."""


def fitting_size(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """Return the size to resize a picture to.

    Multiples of ``factor``, nearest to the picture's shape, with as many pixels as allowed.

    Parameters
    ----------
    height, width : int
    factor : int
        Pixels along an edge of what becomes one token.
    min_pixels, max_pixels : int
        Of the result; a multiple of ``factor`` in both directions wins over ``max_pixels``.

    Raises
    ------
    ConfigError
        One edge is more than 200 times as long as the other.
    """
    if max(height, width) > _LONGEST_TO_SHORTEST * min(height, width):
        raise ConfigError(
            f"a picture of {width} x {height} pixels: one edge may be {_LONGEST_TO_SHORTEST} times "
            "as long as the other at most"
        )
    fitting = (round(height / factor) * factor, round(width / factor) * factor)
    if math.prod(fitting) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (math.floor(edge / shrink / factor) for edge in (height, width))
        return max(1, rows) * factor, max(1, columns) * factor
    if math.prod(fitting) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(edge * grow / factor) for edge in (height, width))
        return rows * factor, columns * factor
    return fitting


def patches(pixels: Tensor, patch_size: int, merge_size: int) -> Tensor:
    """Cut frames that are seen together into patches.

    Parameters
    ----------
    pixels : Tensor, shape (num_frames, num_channels, height, width)
        The frames of one unit; their edges are multiples of ``patch_size * merge_size``.
    patch_size : int
        Pixels along an edge.
    merge_size : int
        Patches along an edge of what becomes one token.

    Returns
    -------
    Tensor, shape (num_patches, num_channels * num_frames * patch_size * patch_size)
        The patches of a token one after the other, and the tokens row by row.
    """
    rows, columns = (edge // (patch_size * merge_size) for edge in pixels.shape[2:])
    cut = pixels.unflatten(3, (columns, merge_size, patch_size))
    cut = cut.unflatten(2, (rows, merge_size, patch_size))
    ordered: Tensor = cut.permute(2, 5, 3, 6, 1, 0, 4, 7)
    return ordered.flatten(4).flatten(0, 3)
