"""Ways to the keys of a graph that no search would reach."""

import torch
from torch import Tensor

_ROWS = 256
"""Orphans at a time; bounds the workspace at 128 MiB for 128K keys."""


def attach_orphans(neighbours: Tensor, rows: Tensor, entries: Tensor) -> Tensor:
    """Lead an edge to every key that cannot be reached, from the nearest one that can.

    Orphans with the same nearest key follow one another in a chain, so that one more edge per key
    is enough for any number of them.

    Parameters
    ----------
    neighbours : Tensor, int64 [num_keys, degree]
        ``-1`` where a key has fewer.
    rows : Tensor, shape (num_keys, dim), float32
        Whose distances count.
    entries : Tensor, int64 [num_entries]

    Returns
    -------
    Tensor, int64 [num_keys, degree + 1]
    """
    reached = reachable(neighbours, entries)
    orphans, hosts = (~reached).nonzero().squeeze(1), reached.nonzero().squeeze(1)
    added = neighbours.new_full((len(neighbours),), -1)
    if len(orphans) > 0:
        parts = [torch.cdist(rows[part], rows[hosts]).argmin(1) for part in orphans.split(_ROWS)]
        host, order = torch.cat(parts).sort(stable=True)
        orphans = orphans[order]
        before = hosts[host]
        follows = host[1:] == host[:-1]
        before[1:] = torch.where(follows, orphans[:-1], before[1:])
        linked = (neighbours[before] == orphans.unsqueeze(1)).any(1)
        added[before] = orphans.masked_fill(linked, -1)
    return torch.cat([neighbours, added.unsqueeze(1)], 1)


def reachable(neighbours: Tensor, entries: Tensor) -> Tensor:
    """Return which keys some path leads to from the entries, bool [num_keys].

    Parameters
    ----------
    neighbours : Tensor, int [num_keys, degree]
        ``-1`` for none.
    entries : Tensor, int [num_entries]
        Likewise.
    """
    reached = torch.zeros(len(neighbours), dtype=torch.bool, device=neighbours.device)
    frontier = entries[entries >= 0].long()
    while len(frontier) > 0:
        reached[frontier] = True
        after = neighbours[frontier].flatten().long()
        after = after[after >= 0].unique()
        frontier = after[~reached[after]]
    return reached
