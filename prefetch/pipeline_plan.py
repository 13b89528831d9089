"""How much to compress, with which codec, and what to leave on the disk. Pure.

The times are those of ``prefetch.pipeline``, and as there the equations are ours. A plan is a
target for what is stored from now on: chunks are encoded when they are written, so those that are
on the disk already have the mix that they have (``layer_seconds`` says what that one takes).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Final

from offload.errors import ConfigError
from offload.prefetch.pipeline import RAW, CodecCost, LayerWork, Links, StageTimes, stage_times

DEFAULT_SLACK: Final = 0.05
"""Estimates of bandwidths are off by about as much, so less is no reason to lose precision."""

_ROUNDING: Final = 1e-9
"""Relative; what rounding makes of times that are equal is far less."""


@dataclass(frozen=True, slots=True)
class PipelinePlan:
    """What to store compressed, and what a layer then takes.

    Attributes
    ----------
    codec : CodecCost
        ``RAW`` if nothing is worth compressing.
    share : float
        Of the disk's bytes that are stored encoded, 0 to 1.
    times : StageTimes
        Of one layer.
    is_hidden : bool
        Whether transfers take no longer than compute does anyway, but for the slack.
    """

    codec: CodecCost
    share: float
    times: StageTimes
    is_hidden: bool


def best_share(work: LayerWork, links: Links, codec: CodecCost) -> float:
    """Return the smallest share to store encoded that makes a layer as fast as any share can.

    Every lane is a straight line over the share, so the slowest one is lowest at an end or where
    two of them cross. Where the disk meets compute on a device that decodes, that is::

        x = clip((n · read_s + D/disk − compute) / (D (1 − 1/ratio)/disk + D/decode), 0, 1)

    0 if the disk can hide raw chunks, or if something else is slower whatever is compressed.

    Parameters
    ----------
    work : LayerWork
    links : Links
    codec : CodecCost
    """
    low = stage_times(work, links, codec, 0.0).lanes
    high = stage_times(work, links, codec, 1.0).lanes
    shares = {0.0, 1.0}
    lines = list(zip(low, high, strict=True))
    for (at0, at1), (other0, other1) in combinations(lines, 2):
        slopes = (at1 - at0) - (other1 - other0)
        if slopes != 0:
            shares.add(min(max((other0 - at0) / slopes, 0.0), 1.0))

    def seconds(share: float) -> float:
        return max(at0 + share * (at1 - at0) for at0, at1 in lines)

    least_s = min(map(seconds, shares)) * (1 + _ROUNDING)
    return min(share for share in shares if seconds(share) <= least_s)


def plan_with(
    work: LayerWork, links: Links, codec: CodecCost, slack: float = DEFAULT_SLACK
) -> PipelinePlan:
    """Return the best share of one codec, and whether it hides the transfers.

    Parameters
    ----------
    work : LayerWork
    links : Links
    codec : CodecCost
    slack : float
        Hidden is what takes no more than ``(1 + slack) * compute_s`` per layer, decoding included.
    """
    share = best_share(work, links, codec)
    times = stage_times(work, links, codec, share)
    limit_s = (1 + slack) * work.compute_s * (1 + 2 * _ROUNDING)
    return PipelinePlan(codec, share, times, times.layer_s <= limit_s)


def choose_codec(
    work: LayerWork,
    links: Links,
    codecs: Iterable[CodecCost],
    slack: float = DEFAULT_SLACK,
) -> PipelinePlan:
    """Choose among raw chunks and codecs.

    The least lossy one that hides the transfers. If none does, the fastest, but a more lossy one
    only if it makes a layer shorter by more than the slack; then ``chunks_that_hide`` says what
    there is time for.

    Parameters
    ----------
    work : LayerWork
    links : Links
    codecs : iterable of CodecCost
        In any order; ``RAW`` is always considered. Of equally lossy ones the first is preferred.
    slack : float
        See ``plan_with``.
    """
    ladder = sorted([RAW, *codecs], key=lambda codec: codec.error)
    plans = [plan_with(work, links, codec, slack) for codec in ladder]
    for plan in plans:
        if plan.is_hidden:
            return plan
    least_s = min(plan.times.layer_s for plan in plans)
    return next(plan for plan in plans if plan.times.layer_s <= (1 + slack) * least_s)


def chunks_that_hide(
    work: LayerWork,
    links: Links,
    codec: CodecCost,
    num_chunks: int,
    slack: float = DEFAULT_SLACK,
) -> int:
    """Return how many of the disk's chunks can be read without anybody waiting for them.

    The rest is what to leave in the estimate. The largest k for which a layer with k/num_chunks of
    the disk's bytes and reads, at the best share of the codec, is hidden; found by bisection, as a
    layer never gets shorter with more to read. 0 if even without any the bus is too slow: then the
    disk is not what to save on.

    Parameters
    ----------
    work : LayerWork
        With all of the chunks.
    links : Links
    codec : CodecCost
    num_chunks : int
        That are wanted from the disk; all of the same size.
    slack : float
        See ``plan_with``.

    Raises
    ------
    ConfigError
        ``num_chunks`` is negative.
    """
    if num_chunks < 0:
        raise ConfigError(f"{num_chunks} chunks cannot be wanted from the disk")
    low, high = 0, num_chunks
    while low < high:
        middle = (low + high + 1) // 2
        part = work.with_share_of_disk(middle / num_chunks)
        if plan_with(part, links, codec, slack).is_hidden:
            low = middle
        else:
            high = middle - 1
    return low
