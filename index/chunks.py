"""Consecutive tokens summarised chunk by chunk, and chunks taken whole by their score."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from offload.errors import ConfigError
from offload.index.base import agreed


@dataclass(frozen=True, slots=True)
class Chunking:
    """How the tokens of an index are cut into chunks.

    Attributes
    ----------
    chunk_tokens : int
        Positive.
    runs : tuple of int
        Tokens of each run that was cut by itself: the last chunk of a run may be shorter. Runs
        are as long as they can be, so that whole chunks leave no trace of where a run ended.
    """

    chunk_tokens: int
    runs: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.chunk_tokens < 1:
            raise ConfigError(f"chunk_tokens={self.chunk_tokens}; a chunk has at least one token")

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Return how consecutive runs are cut, taken together."""
        chunk_tokens = agreed([part.chunk_tokens for part in parts])
        runs: list[int] = []
        for num_tokens in (run for part in parts for run in part.runs):
            if runs and runs[-1] % chunk_tokens == 0:
                runs[-1] += num_tokens
            else:
                runs.append(num_tokens)
        return cls(chunk_tokens, tuple(runs))

    def prefix(self, num_tokens: int) -> Self:
        """Return how the first tokens are cut."""
        starts = [sum(self.runs[:i]) for i in range(len(self.runs))]
        lengths = [
            min(run, num_tokens - start) for run, start in zip(self.runs, starts, strict=True)
        ]
        return type(self)(self.chunk_tokens, tuple(length for length in lengths if length > 0))

    @property
    def num_chunks(self) -> int:
        """Chunks of all runs."""
        return sum(-(-run // self.chunk_tokens) for run in self.runs)

    @property
    def num_tokens(self) -> int:
        """Tokens of all chunks."""
        return sum(self.runs)

    def lengths(self, device: torch.device) -> Tensor:
        """Return the tokens of each chunk, int64 ``[num_chunks]``."""
        lengths = []
        for run in self.runs:
            lengths += [self.chunk_tokens] * (run // self.chunk_tokens)
            lengths += [run % self.chunk_tokens] * (run % self.chunk_tokens > 0)
        return torch.tensor(lengths, device=device)


def per_chunk(rows: Tensor, chunk_tokens: int, summarise: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function to every chunk of a run.

    Parameters
    ----------
    rows : Tensor, shape (num_heads, num_tokens, dim)
    chunk_tokens : int
    summarise : callable
        From ``[num_heads, num_chunks, num_rows, dim]`` to ``[num_heads, num_chunks, ...]``.

    Returns
    -------
    Tensor, shape (num_heads, num_chunks, ...)
    """
    num_whole = rows.shape[1] // chunk_tokens * chunk_tokens
    whole, rest = rows[:, :num_whole], rows[:, num_whole:]
    parts = [summarise(whole.unflatten(1, (-1, chunk_tokens)))] if num_whole else []
    if rest.shape[1]:
        parts.append(summarise(rest.unsqueeze(1)))
    return torch.cat(parts, 1)


def best_tokens(scores: Tensor, lengths: Tensor, budget: int) -> Tensor:
    """Return the tokens of the best chunks, whole but for the last, which the budget cuts.

    Parameters
    ----------
    scores : Tensor, shape (num_heads, num_chunks)
    lengths : Tensor, int64 [num_chunks]
    budget : int

    Returns
    -------
    Tensor, int64 [num_heads, min(budget, num_tokens)]
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    stops = lengths[order].cumsum(1)
    places = torch.arange(min(budget, int(lengths.sum())), device=scores.device)
    rank = torch.searchsorted(stops, places.expand(scores.shape[0], -1).contiguous(), right=True)
    chunk = order.gather(1, rank)
    first = lengths.cumsum(0) - lengths
    offset = places - stops.gather(1, rank) + lengths[chunk]
    return first[chunk] + offset
