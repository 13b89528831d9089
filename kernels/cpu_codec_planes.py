"""Elements of 16 bits taken apart into two planes of bytes, and put together; needs numba.

As ``split`` and ``join`` of ``tiers.codec_exponents``, which are the definition.
"""

import numpy as np
from numba import njit
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Words = NDArray[np.uint16]


@njit(nogil=True, cache=True)
def split(words: Words, high: Bytes, low: Bytes) -> None:
    """Set ``high`` [1 + num_tokens, dim] and ``low`` of words ``[num_tokens, dim]``."""
    top = high[0]
    top[:] = 0
    for token in range(len(words)):
        row, own_high, own_low = words[token], high[token + 1], low[token]
        for i in range(len(row)):
            word = np.uint32(row[i])
            own_high[i] = np.uint8(word >> np.uint32(7))
            own_low[i] = np.uint8(word << np.uint32(1) | word >> np.uint32(15))
            top[i] = max(top[i], own_high[i])
    for token in range(1, len(high)):
        own = high[token]
        for i in range(len(top)):
            own[i] = top[i] - own[i]


@njit(nogil=True, cache=True)
def join(high: Bytes, low: Bytes, words: Words) -> None:
    """Undo ``split``."""
    top = high[0]
    for token in range(len(words)):
        row, own_high, own_low = words[token], high[token + 1], low[token]
        for i in range(len(row)):
            exponent = np.uint32(np.uint8(top[i] - own_high[i]))
            rest = np.uint32(own_low[i])
            row[i] = np.uint16(
                exponent << np.uint32(7) | rest >> np.uint32(1) | rest << np.uint32(15)
            )
