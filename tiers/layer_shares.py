"""How much of a tier each layer deserves, from where its attention goes. Pure."""

import math
from collections.abc import Sequence

from torch import Tensor

from offload.errors import ConfigError


def layer_preference(rows: Tensor, t1: float = 1.0, t2: float = 1.0) -> float:
    """Return how much a layer gains from room: ``P = H^(1/t1) · V^(1/t2)``.

    H is the entropy of the attention, averaged over the queries: attention that is spread needs
    many chunks. V is the variance over the queries, summed over the chunks: attention that moves
    needs other chunks every time.

    Parameters
    ----------
    rows : Tensor, shape (num_queries, num_chunks), float
        Attention of successive queries to each chunk, not negative; 32 queries are enough.
    t1, t2 : float
        The larger, the less entropy or variance counts.

    Returns
    -------
    float
        0 for attention that never moves, or all goes to one chunk.

    Raises
    ------
    ConfigError
        ``rows`` has not two dimensions, or no rows; ``t1`` or ``t2`` is not positive.

    Notes
    -----
    CAKE (arXiv:2503.12491), over chunks instead of tokens, and to divide a tier instead of what is
    kept at all.
    """
    if rows.ndim != 2 or len(rows) == 0:
        raise ConfigError(f"attention rows are [num_queries, num_chunks], not {list(rows.shape)}")
    if not (t1 > 0 and t2 > 0):
        raise ConfigError(f"temperatures {t1} and {t2}: both have to be positive")
    attention = rows.double()
    mean = attention.mean(0)
    mean = mean[mean > 0] / mean.sum()
    entropy = -float((mean * mean.log()).sum())
    variance = float(attention.var(0, correction=0).sum())
    return float(max(0.0, entropy) ** (1 / t1) * variance ** (1 / t2))


def layer_shares(preferences: Sequence[float], least: float = 0.0) -> list[float]:
    """Return shares in proportion to preferences, that add up to 1.

    Parameters
    ----------
    preferences : sequence of float
        Of each layer, see ``layer_preference``. All zero: all layers are alike.
    least : float
        Part of an equal share that every layer has whatever its preference, 0 to 1.

    Raises
    ------
    ConfigError
        A preference is negative or not finite, or ``least`` is not from 0 to 1.
    """
    if not all(0 <= preference < math.inf for preference in preferences):
        raise ConfigError(f"preferences are finite and not negative, unlike {list(preferences)}")
    if not 0 <= least <= 1:
        raise ConfigError(f"layers cannot all have {least} of an equal share")
    total = math.fsum(preferences)
    equal = 1 / max(1, len(preferences))
    parts = [preference / total if total > 0 else equal for preference in preferences]
    return [least * equal + (1 - least) * part for part in parts]


def slots_by_layer(shares: Sequence[float], num_slots: int) -> list[int]:
    """Divide whole slots by shares, rounding so that all are given out.

    Parameters
    ----------
    shares : sequence of float
        That add up to 1.
    num_slots : int

    Returns
    -------
    list of int
        By layer; each within one slot of its exact share.

    Raises
    ------
    ConfigError
        There are no layers, or less than no slots.
    """
    if not shares or num_slots < 0:
        raise ConfigError(f"{num_slots} slots cannot be divided among {len(shares)} layers")
    exact = [share * num_slots for share in shares]
    slots = [math.floor(part) for part in exact]
    by_rest = sorted(range(len(shares)), key=lambda layer: slots[layer] - exact[layer])
    for layer in by_rest[: num_slots - sum(slots)]:
        slots[layer] += 1
    return slots
