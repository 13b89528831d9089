"""Which pages of files are read for pieces of them. Pure, no I/O."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from offload.types import PAGE_BYTES

Ints = NDArray[np.int64]


class Extents(NamedTuple):
    """Pages to read: pieces of a file that share pages, or whose pages follow each other.

    Attributes
    ----------
    file, offsets, num_bytes, places : ndarray, int64 [num_extents]
        In which file, where, how long, and where in memory; in the order of the files.
    """

    file: Ints
    offsets: Ints
    num_bytes: Ints
    places: Ints


def plan_reads(file: Ints, starts: Ints, piece_bytes: Ints) -> tuple[Extents, Ints]:
    """Join pieces into extents of whole pages. Pure.

    Parameters
    ----------
    file, starts, piece_bytes : ndarray, int64 [num_pieces]
        In which file each piece lies, where it begins there, and how long it is; file after file.

    Returns
    -------
    Extents
    ndarray, int64 [num_pieces]
        Where in memory each piece will begin.
    """
    first = starts // PAGE_BYTES
    end = -(-(starts + piece_bytes) // PAGE_BYTES)
    is_new = np.ones(len(starts), np.bool_)
    # Pieces that are not in order begin a new extent, too: slower, and as right.
    apart = (first[1:] > end[:-1]) | (first[1:] < first[:-1])
    is_new[1:] = apart | (file[1:] != file[:-1])
    leads = np.flatnonzero(is_new)
    tails = np.append(leads[1:], len(starts))[: len(leads)] - 1
    offsets = first[leads] * PAGE_BYTES
    num_bytes = end[tails] * PAGE_BYTES - offsets
    places = np.cumsum(num_bytes) - num_bytes
    extent = np.cumsum(is_new) - 1
    memory = starts + (places - offsets)[extent]
    return Extents(file[leads], offsets, num_bytes, places), memory
