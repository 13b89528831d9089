"""What the compiled scan takes and gives, as arrays of numpy."""

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

FLOATS: Final = {"reassoc", "contract", "nsz", "arcp"}
"""What may be assumed of floats: the order of sums does not matter, but infinities do."""


class Query(NamedTuple):
    """Queries of all heads, rounded.

    Attributes
    ----------
    wide : int16 [num_heads, num_queries, key_dim]
    wide_unit : float32 [num_heads, num_queries]
    bytes_ : int8 [num_heads, num_words * 8 / num_bits, num_queries, 4]
        Rotated.
    unit, middle : float32 [num_heads, num_queries]
        Of the rotated ones; and what the middle of the levels comes to.
    norm : float32 [num_heads, num_queries]
    """

    wide: NDArray[np.int16]
    wide_unit: NDArray[np.float32]
    bytes_: NDArray[np.int8]
    unit: NDArray[np.float32]
    middle: NDArray[np.float32]
    norm: NDArray[np.float32]


class Tables(NamedTuple):
    """``ScanTables`` as arrays; half precision as the bits it has, uint16."""

    centroids: NDArray[np.int8]
    centroid_scale: NDArray[np.uint16]
    value_means: NDArray[np.int8]
    value_mean_scale: NDArray[np.uint16]
    counts: NDArray[np.int16]
    spread: NDArray[np.uint16]
    radius: NDArray[np.uint16]
    key_bits: NDArray[np.uint8]
    key_scale: NDArray[np.uint16]
    value_bits: NDArray[np.uint8]
    value_scale: NDArray[np.uint16]
    basis: NDArray[np.uint16]


class Found(NamedTuple):
    """Where results go; see ``Scan``."""

    places: NDArray[np.int64]
    clusters: NDArray[np.int64]
    logits: NDArray[np.float32]
    rest_out: NDArray[np.float32]
    rest_lse: NDArray[np.float32]
    squares: NDArray[np.float32]
    num_scanned: NDArray[np.int64]


LOGS: Final = np.log(np.maximum(np.arange(1 << 14), 1e-30)).astype(np.float32)
"""Logarithms of counts of keys."""

_positive = (np.arange(1 << 15, dtype=np.uint32) << 16).view(np.float32)
LOGS_OF_BRAINS: Final = np.log(np.maximum(np.nan_to_num(_positive, posinf=1e38), 1e-12)).astype(
    np.float32
)
"""Logarithms of positive bfloat16 numbers, by their bits."""
