"""Which blocks of places a scan touches, and whose places they are. Needs numba."""

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray


class Runs(NamedTuple):
    """Consecutive scanned places of one cluster; filling counts as one more cluster.

    Attributes
    ----------
    starts : int32 [num_runs + 1]
        In scanned places: 16 for each scanned block.
    clusters : int32 [num_runs]
    segments : int32 [num_blocks]
        Of each scanned block.
    left : int32 [num_clusters]
        Keys of each cluster that are not scanned.
    """

    starts: NDArray[np.int32]
    clusters: NDArray[np.int32]
    segments: NDArray[np.int32]
    left: NDArray[np.int32]


@njit(nogil=True, cache=True)
def find_runs(
    counts: NDArray[np.int16], sizes: NDArray[np.int64], chosen: NDArray[np.uint8],
    blocks: NDArray[np.int32],
) -> tuple[int, Runs]:  # fmt: skip
    """List the blocks that hold a key of a chosen cluster, and whose places they are.

    Returns
    -------
    num_blocks : int
        Written to ``blocks``.
    runs : Runs
    """
    num_clusters = len(counts)
    left = counts.astype(np.int32)
    starts = np.empty(num_clusters * 2 + len(blocks) + 2, np.int32)
    clusters, segments = np.empty(len(starts), np.int32), np.empty(len(blocks), np.int32)
    num_blocks, num_runs, first_block, first_cluster = 0, 0, 0, 0
    for segment in range(len(sizes)):
        num_tokens, own_clusters = sizes[segment]
        stop_place = first_block * 16 + num_tokens
        place, last = np.int64(first_block * 16), np.int64(-1)
        for cluster in range(first_cluster, first_cluster + own_clusters):
            stop = place + counts[cluster]
            if chosen[cluster] and stop > place:
                for block in range(max(place // 16, last + 1), (stop - 1) // 16 + 1):
                    blocks[num_blocks], segments[num_blocks] = block, segment
                    num_blocks += 1
                    last = block
            place = stop
        first_block += (num_tokens + 15) // 16
        first_cluster += own_clusters
    cluster, stop, segment = np.int64(-1), np.int64(0), np.int64(-1)
    first_block, last_block, first_cluster = np.int64(0), np.int64(0), np.int64(0)
    for slot in range(num_blocks):
        place = np.int64(blocks[slot]) * 16
        while segment < segments[slot]:
            segment += 1
            if segment > 0:
                first_cluster += sizes[segment - 1, 1]
            first_block = last_block
            last_block += (sizes[segment, 0] + 15) // 16
            cluster = first_cluster
            stop = first_block * 16 + counts[cluster]
        stop_place = min(place + 16, first_block * 16 + sizes[segment, 0])
        first = place
        while first < stop_place:
            while stop <= first:
                cluster += 1
                stop += counts[cluster]
            if num_runs == 0 or clusters[num_runs - 1] != cluster:
                starts[num_runs], clusters[num_runs] = slot * 16 + first - place, cluster
                num_runs += 1
            after = min(stop, stop_place)
            left[cluster] -= after - first
            first = after
        if stop_place < place + 16:
            starts[num_runs], clusters[num_runs] = slot * 16 + stop_place - place, num_clusters
            num_runs += 1
    starts[num_runs] = num_blocks * 16
    return num_blocks, Runs(
        starts[: num_runs + 1], clusters[:num_runs], segments[:num_blocks], left
    )
