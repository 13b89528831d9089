"""How much attention each chunk gets in a step, for those who place chunks by it."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
from torch import Tensor

from offload.kernels import dispatch
from offload.sparse.outlook import Run
from offload.types import ChunkId, ChunkLayout

_EVERY: Final = 4
"""Steps of a cache or fork, of which one is measured."""

_MOST_ROWS: Final = 256
"""Rows of a head that are looked at: of more, every second, third and so on stands for all."""


@dataclass(slots=True)
class _Steps:
    """Where a cache or fork is.

    Attributes
    ----------
    last_layer : int
        The latest that was asked for, counted among those that are offloaded.
    number : int
        Of steps so far.
    is_measured : bool
        Whether the step that goes on is.
    masses : dict of ChunkId to float
        Of what it read sparsely, so far.
    whole : set of ChunkId
        What it reads whole, whatever is asked.
    """

    last_layer: int = sys.maxsize
    number: int = 0
    is_measured: bool = False
    masses: dict[ChunkId, float] = field(default_factory=dict)
    whole: set[ChunkId] = field(default_factory=set)


class ImportanceWatch:
    """Measures the attention of one step in four, and reports it before the next one begins.

    The mass of a chunk is the share of a layer's attention that went to those of its tokens that
    were read, a mean over heads, rows and positions; where many were read, as a sample of them has
    it. Chunks that a layer reads whole count as much
    as the one that got most. A step begins when the first of a cache's layers is asked again.

    Only the thread that holds the engine's lock calls methods.

    Parameters
    ----------
    layout : ChunkLayout
    reports : sequence of callable
        Each gets the masses of a step, while no address of a chunk is in use.
    most_rows : int
        Of a head, row and position, that are looked at; others the next time.
    """

    def __init__(
        self,
        layout: ChunkLayout,
        reports: Sequence[Callable[[Mapping[ChunkId, float]], object]],
        most_rows: int = _MOST_ROWS,
    ) -> None:
        self._layout = layout
        self._reports = reports
        self._most_rows = most_rows
        self._steps: dict[int, _Steps] = {}
        self._now = _Steps()
        self._weight = 1.0

    def begin(self, owner: int, layer: int, num_queries: int) -> None:
        """Take note that a layer is asked, which may be the first one of a step.

        Parameters
        ----------
        owner : int
            Identity of the cache or fork.
        layer : int
            Counted among those that are offloaded.
        num_queries : int
            Rows times positions.
        """
        steps = self._now = self._steps.setdefault(owner, _Steps())
        self._weight = 1 / num_queries
        begins, steps.last_layer = layer <= steps.last_layer, layer
        if not begins:
            return
        if steps.is_measured:
            most = max(steps.masses.values(), default=1.0)
            masses = {**steps.masses, **dict.fromkeys(steps.whole, most)}
            steps.masses.clear()
            steps.whole.clear()
            for report in self._reports:
                report(masses)
        steps.number += 1
        steps.is_measured = steps.number % _EVERY == 0

    def add_whole(self, rows: Sequence[Sequence[ChunkId]], num_chunks: int, but: range) -> None:
        """Take note that the first chunks of the layer's rows are read whole, but for some."""
        if self._now.is_measured:
            for row in rows:
                self._now.whole.update(row[: but.start], row[but.stop : num_chunks])

    def add(self, query: Tensor, run: Run, ids: Tensor, addresses: Tensor, lse: Tensor) -> None:
        """Take note of what one row and position of the layer read, while it can be read.

        Parameters
        ----------
        query : Tensor, shape (num_heads, group_size, key_dim), float32
            Scaled.
        run : Run
            The chunks.
        ids, addresses : Tensor, int64 [num_heads, num_rows]
            Tokens of the run, and where their rows are; 0: not read.
        lse : Tensor, shape (num_heads, group_size), float32
            Of all that the layer knows of, estimates included.
        """
        steps, layout = self._now, self._layout
        if not steps.is_measured:
            return
        stride = -(-ids.shape[1] // self._most_rows)
        sample = slice(steps.number // _EVERY % stride, None, stride) if stride else slice(0)
        ids, addresses = ids[:, sample].contiguous(), addresses[:, sample].contiguous()
        keys = dispatch.read_rows(addresses, layout.key_dim, layout.dtype).float()
        shares = torch.exp(query @ keys.mT - lse.unsqueeze(-1)).mean(1)
        found = addresses != 0
        weights = (shares[found] * (stride * self._weight / len(addresses))).cpu().numpy()
        positions = ids[found].cpu().numpy() // layout.chunk_tokens
        masses = np.bincount(positions, weights, minlength=len(run.chunks))
        for position in masses.nonzero()[0].tolist():
            chunk = run.chunks[position]
            steps.masses[chunk] = steps.masses.get(chunk, 0.0) + float(masses[position])

    def forget(self, owner: int) -> None:
        """Drop what is kept for a cache or fork."""
        self._steps.pop(owner, None)
