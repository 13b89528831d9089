"""Choose the largest of many, by counting digits of their bits. Needs numba."""

import numpy as np
from numba import njit
from numpy.typing import NDArray

from offload.kernels.cpu_intrinsics import sortable


@njit(inline="always")
def ordered(number: np.float32) -> np.uint32:
    """Return an unsigned number in the order of floats; zero is below all of them."""
    return np.uint32(sortable(number)) ^ np.uint32(0x80000000)


@njit(nogil=True, cache=True)
def cut_at(
    keys: NDArray[np.uint32], weights: NDArray[np.int16], wanted: int
) -> tuple[np.uint32, int]:
    """Return where to cut keys so that the larger ones weigh what is wanted.

    Parameters
    ----------
    keys : uint32 [num_keys]
    weights : int16 [num_keys] or [1]
        Not negative. A single one holds for all keys.
    wanted : int

    Returns
    -------
    key : uint32
        All larger keys are chosen.
    remaining : int
        Of keys that are equal, the first are chosen until this much is reached.
    """
    found, mask, remaining = np.uint32(0), np.uint32(0), wanted
    is_same = weights.size == 1
    for shift, width in ((21, 11), (10, 11), (0, 10)):
        counts = np.zeros(2048, np.int64)
        digit_mask = np.uint32((1 << width) - 1)
        for i in range(keys.size):
            if keys[i] & mask == found:
                digit = keys[i] >> np.uint32(shift) & digit_mask
                counts[digit] += weights[0 if is_same else i]
        digit = int(digit_mask)
        while digit > 0 and counts[digit] < remaining:
            remaining -= counts[digit]
            digit -= 1
        found |= np.uint32(digit) << np.uint32(shift)
        mask |= digit_mask << np.uint32(shift)
    return found, remaining


@njit(nogil=True, cache=True)
def best(scores: NDArray[np.float32], count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return where the largest scores are, in ascending order, and the rank of each.

    Ranks are exact to a thousandth of how far the scores found lie apart. Of equal scores at the
    end the first are taken.

    Parameters
    ----------
    scores : float32 [num_scores]
    count : int
        At most ``num_scores``.
    """
    lowest = _bin_of(scores, count)
    places, keys = np.empty(len(scores), np.int32), np.empty(len(scores), np.uint32)
    number = 0
    for i in range(len(scores)):
        key = ordered(scores[i])
        places[number], keys[number] = i, key
        number += key >= lowest
    key, remaining = cut_at(keys[:number], np.ones(1, np.int16), count)
    found = np.empty(count, np.int32)
    taken = 0
    for i in range(number):
        is_equal = keys[i] == key
        if (keys[i] > key or (is_equal and remaining > 0)) and taken < count:
            remaining -= is_equal
            found[taken] = places[i]
            taken += 1
    return found[:taken], _ranks(scores, found[:taken])


@njit(nogil=True, cache=True)
def _bin_of(scores: NDArray[np.float32], count: int) -> np.uint32:
    """Return a key that ``count`` scores reach, and not many more."""
    counts = np.zeros(2048, np.int64)
    for i in range(len(scores)):
        counts[ordered(scores[i]) >> np.uint32(21)] += 1
    digit, number = 2047, counts[2047]
    while digit > 0 and number < count:
        digit -= 1
        number += counts[digit]
    return np.uint32(digit) << np.uint32(21)


@njit(nogil=True, cache=True)
def _ranks(scores: NDArray[np.float32], places: NDArray[np.int32]) -> NDArray[np.int32]:
    """Return the places of scores among each other, the largest first."""
    ranks = np.zeros(len(places), np.int32)
    if len(places) == 0:
        return ranks
    top, low = scores[places[0]], scores[places[0]]
    for i in range(len(places)):
        top, low = max(top, scores[places[i]]), min(low, scores[places[i]])
    step = np.float32(1023.0) / max(top - low, np.float32(1e-30))
    stops = np.zeros(1025, np.int32)
    for i in range(len(places)):
        digit = np.int64((top - scores[places[i]]) * step)
        ranks[i] = digit
        stops[digit + 1] += 1
    for digit in range(1024):
        stops[digit + 1] += stops[digit]
    for i in range(len(places)):
        digit = ranks[i]
        ranks[i] = stops[digit]
        stops[digit] += 1
    return ranks
