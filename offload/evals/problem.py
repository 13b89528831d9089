"""Compare attention through an index with full attention, one query at a time."""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.errors import ConfigError
from offload.index.base import Hits, KeyIndex
from offload.kernels.reference import merge
from offload.types import Partial

SINK_TOKENS, WINDOW_TOKENS = 4, 64
"""Read exactly whatever the budget; the tokens between are indexed."""

RECALL_AT = 100

_SHARP, _MEDIUM = 0.73, 0.45
"""Share of the softmax on the 100 best keys from which a head counts as sharp, and as medium."""


def class_of(concentration: float) -> str:
    """Return ``flat``, ``medium`` or ``sharp``, by the softmax's share on the 100 best keys."""
    return "sharp" if concentration >= _SHARP else "medium" if concentration >= _MEDIUM else "flat"


def require_keys(num_keys: int) -> None:
    """Raise ConfigError if too little would be left between sinks and window."""
    least = SINK_TOKENS + WINDOW_TOKENS + RECALL_AT + 1
    if num_keys < least:
        raise ConfigError(f"{num_keys} keys are too few to compare; at least {least}")


class Problem:
    """One head, and full attention on it.

    Parameters
    ----------
    keys, values : Tensor, shape (num_keys, dim)
    queries : Tensor, shape (num_queries, key_dim)
        Asked one by one, after the last key.
    train_queries : Tensor, shape (num_train_queries, key_dim), optional
        Such as came before, for indexes that learn from them.
    scale : float, optional
        Of logits; default: one over the root of ``key_dim``.
    dtype : torch.dtype
        Keys and values are rounded to it.

    Raises
    ------
    ConfigError
        There are too few keys for anything to be left between sinks and window.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        queries: Tensor,
        train_queries: Tensor | None = None,
        scale: float | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        require_keys(len(keys))
        scale = 1 / math.sqrt(keys.shape[-1]) if scale is None else scale
        self.keys, self.values = keys.to(dtype)[None], values.to(dtype)[None]
        self.num_keys, self.num_queries = len(keys), len(queries)
        self.queries = queries.float() * scale
        self.train_queries = None if train_queries is None else train_queries.float()[None] * scale
        self.logits = self.queries @ self.keys[0].float().T
        self.lse = self.logits.logsumexp(-1)
        self.out = torch.softmax(self.logits, -1) @ self.values[0].float()
        self.indexed = slice(SINK_TOKENS, self.num_keys - WINDOW_TOKENS)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values of the head."""
        return self.keys.nbytes + self.values.nbytes

    def concentration(self) -> float:
        """Return the share of the softmax that the best 100 indexed keys have, on average."""
        best = self.logits[:, self.indexed].topk(RECALL_AT, -1).values
        return float((best.logsumexp(-1) - self.lse).exp().mean())

    def read(self, hits: Hits) -> tuple[Tensor, Tensor]:
        """Return which tokens are read, bool ``[num_keys]``, and the values of those found."""
        kept = torch.ones(self.num_keys, dtype=torch.bool)
        kept[self.indexed] = False
        kept[hits.ids[hits.found] + SINK_TOKENS] = True
        return kept, self.values[:, hits.ids[0].clamp_min(0) + SINK_TOKENS]

    def attend(self, number: int, kept: Tensor) -> Partial:
        """Attend with one query to the tokens that are kept."""
        logits, values = self.logits[number, kept], self.values[0, kept].float()
        out = torch.softmax(logits, -1) @ values
        return Partial(out.view(1, 1, -1), logits.logsumexp(-1).view(1, 1))

    def recall(self, number: int, hits: Hits) -> float:
        """Return the share of the best indexed keys that were found."""
        best = self.logits[number, self.indexed].topk(RECALL_AT).indices
        return float(torch.isin(best, hits.ids).float().mean())


@dataclass(frozen=True, slots=True)
class Answer:
    """What one query got.

    Attributes
    ----------
    recall : float
        Share of the best indexed keys that were read.
    mass : float
        Share of the softmax that was read.
    mass_error : float
        Of the denominator of the softmax, with what was estimated, relative.
    error : float
        Of the output, relative to its length.
    read_tokens : int
        Of those that are indexed.
    scanned_bytes : int
    search_ms : float
        Of CPU time, for the search and the estimate.
    """

    recall: float
    mass: float
    mass_error: float
    error: float
    read_tokens: int
    scanned_bytes: int
    search_ms: float


def ask(problem: Problem, index: KeyIndex, number: int, budget: float) -> Answer:
    """Attend with one query through an index; the budget is a share of all tokens."""
    query = problem.queries[number].view(1, 1, -1)
    started = time.process_time()
    hits = index.search(query, int(budget * problem.num_keys))
    search_s = time.process_time() - started
    kept, values = problem.read(hits)
    exact = problem.attend(number, kept)
    started = time.process_time()
    tail = index.tail(query, hits, hits.found, values)
    search_s += time.process_time() - started
    merged = exact if tail is None else merge([exact, tail])
    wanted, lse = problem.out[number], problem.lse[number]
    return Answer(
        recall=problem.recall(number, hits),
        mass=float((exact.lse[0, 0] - lse).exp()),
        mass_error=float(((merged.lse[0, 0] - lse).exp() - 1).abs()),
        error=float((merged.out[0, 0] - wanted).norm() / wanted.norm()),
        read_tokens=int(hits.found.sum()),
        scanned_bytes=int(hits.scanned_bytes),
        search_ms=1e3 * search_s,
    )
