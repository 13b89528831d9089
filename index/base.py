"""The contract of an index: keys in, the tokens a query needs out, and an estimate of the rest."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from offload.errors import ConfigError
from offload.kernels.scan import Combine as Combine
from offload.kernels.scan import combine_shares
from offload.types import Partial

_T = TypeVar("_T")

NO_TOKEN = -1
"""Fills the places of heads that found fewer tokens than others."""


@dataclass(frozen=True, slots=True)
class Hits:
    """What a search found.

    Attributes
    ----------
    ids : Tensor, int64 [num_heads, num_hits]
        Tokens, counted from the first of the index, in no order; ``NO_TOKEN`` where a head has
        fewer.
    scanned_bytes : int or Tensor, int64 []
        Bytes of the index that the search read, for all heads. A tensor where reading it waits for
        a device.
    state : object
        What ``tail`` of the same index can use again, and the next ``search``.
    """

    ids: Tensor
    scanned_bytes: int | Tensor
    state: object = None

    @property
    def found(self) -> Tensor:
        """Bool [num_heads, num_hits]: which places hold a token."""
        return self.ids >= 0

    def first(self, counts: Tensor) -> "Hits":
        """Return the first hits of each head, all of them where there are fewer.

        Parameters
        ----------
        counts : Tensor, int64 [num_heads]
        """
        most = min(int(counts.max()), self.ids.shape[1])
        places = torch.arange(most, device=counts.device)
        kept = places < counts.unsqueeze(1)
        return replace(self, ids=torch.where(kept, self.ids[:, :most], NO_TOKEN))


class KeyIndex(ABC):
    """An immutable index over a run of tokens of one layer and row, for all its KV heads.

    Indexes of consecutive runs are joined with ``join``, so that what was indexed while it grew is
    searched as one. Searching does not change an index: any number of threads may do it.
    """

    learns_from_queries: ClassVar[bool] = False
    """Whether ``build`` takes ``queries`` such as will be asked."""

    expects_errors: ClassVar[bool] = False
    """Whether ``expected_errors`` can tell."""

    follows_searches: ClassVar[bool] = False
    """Whether ``search`` goes on from where the last one was."""

    is_abstract: ClassVar[bool] = False
    """Whether it is so small beside the keys that it is saved with a session."""

    tail_takes_values: ClassVar[bool] = False
    """Whether ``tail`` looks at the values that were read."""

    @property
    @abstractmethod
    def num_heads(self) -> int:
        """KV heads."""

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """Tokens per head."""

    @property
    def num_bytes(self) -> int:
        """Bytes that stay resident."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @classmethod
    @abstractmethod
    def build(cls, keys: Tensor, values: Tensor) -> Self:
        """Index a run of at least one token; methods add options of their own.

        Parameters
        ----------
        keys : Tensor, shape (num_heads, num_tokens, key_dim)
            As they are attended: after the rotary embedding.
        values : Tensor, shape (num_heads, num_tokens, value_dim)

        Raises
        ------
        ConfigError
            A key or value is not finite.
        """

    @classmethod
    @abstractmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Return one index over consecutive runs; equal to having searched them together.

        Raises
        ------
        ConfigError
            The parts were built with different options.
        """

    @abstractmethod
    def prefix(self, num_tokens: int) -> Self:
        """Return the index over the first tokens, with its tensors as views.

        Parameters
        ----------
        num_tokens : int
            Positive; as many as the first parts had of which the index was joined.
        """

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """Return what the index consists of, to be written beside the chunks it summarises."""

    @abstractmethod
    def meta(self) -> dict[str, Any]:
        """Return what ``restore`` needs besides the tensors, as JSON can hold it."""

    @classmethod
    @abstractmethod
    def restore(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Self:
        """Return the index that these came from; it keeps the tensors, on the device they are on.

        Parameters
        ----------
        tensors, meta
            As ``tensors`` and ``meta`` gave them; ``meta`` may have been through JSON.
        """

    @abstractmethod
    def search(
        self, query: Tensor, budget: int, group: Combine = "max", past: Hits | None = None
    ) -> Hits:
        """Return the tokens that the queries of each head need most.

        Parameters
        ----------
        query : Tensor, shape (num_heads, num_queries, key_dim), float32
            Scaled: ``query @ key`` is the logit. The queries of a group share what is found;
            their scores are combined after the softmax of each, never before.
        budget : int
            Tokens per head, at most.
        group : {"max", "sum"}
            How: see ``combine_shares``.
        past : Hits, optional
            What the last search for the same heads came to, in this index or in one that it has
            grown from: a hint, for methods of which ``follows_searches`` is true.
        """

    def expected_errors(self, query: Tensor, hits: Hits) -> Tensor:
        """Estimate the error of the output for every number of tokens that may be read.

        Parameters
        ----------
        query, hits
            As for ``tail``. The hits are in the order in which they are best read.

        Returns
        -------
        Tensor, float32 [num_heads, num_hits + 1]
            The error of the output relative to its length if only the first ``n`` are read, for the
            query of the group that suffers most.

        Raises
        ------
        ConfigError
            This method cannot tell; ``expects_errors`` says so before.
        """
        raise ConfigError(f"{type(self).__name__} cannot tell how far off an answer is")

    def tail(self, query: Tensor, hits: Hits, have: Tensor, values: Tensor) -> Partial | None:
        """Estimate attention over every token that was not read; None if this method cannot.

        Parameters
        ----------
        query : Tensor
            As for ``search``.
        hits : Hits
            What ``search`` found for it.
        have : Tensor, bool [num_heads, num_hits]
            Which of them were read; the others count as not read.
        values : Tensor, shape (num_heads, num_hits, value_dim)
            Of those that were read; only used where ``tail_takes_values``.

        Returns
        -------
        Partial
            ``out`` [num_heads, num_queries, value_dim], ``lse`` [num_heads, num_queries].
        """
        return None


def combine_group(logits: Tensor, group: Combine = "max") -> Tensor:
    """Return one score per key for a group of queries, from the softmax of each.

    Parameters
    ----------
    logits : Tensor, shape (num_heads, num_queries, num_keys)
    group : {"max", "sum"}

    Returns
    -------
    Tensor, shape (num_heads, num_keys)
        The log of a share, which unlike the share itself does not become zero for all other keys
        when one is far ahead.
    """
    return combine_shares(torch.log_softmax(logits, -1), group)


def require_finite(keys: Tensor, values: Tensor) -> None:
    """Raise ConfigError, naming token and head, if a key or value is not finite.

    Parameters
    ----------
    keys, values : Tensor, shape (num_heads, num_tokens, dim)
    """
    for name, rows in (("key", keys), ("value", values)):
        # The extremes of rows with anything that is not finite are not finite either.
        if rows.numel() and bool(torch.stack(rows.aminmax()).isfinite().all()):
            continue
        wrong = (~torch.isfinite(rows)).nonzero()
        if len(wrong):
            head, token, _ = wrong[0].tolist()
            raise ConfigError(f"the {name} of token {token}, head {head} is not finite")


def agreed(options: Sequence[_T]) -> _T:
    """Return the options that all parts of an index share, or raise ConfigError."""
    for other in options[1:]:
        if other != options[0]:
            raise ConfigError(f"parts of one index differ in their options: {options[0]}, {other}")
    return options[0]
