"""Choosing the next token of one request, with randomness of its own."""

import secrets
from collections import Counter
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from offload.daemon.requests import Sampling, TokenLogprob
from offload.daemon.work.grammar import Grammar

_NO_TOPS: tuple[TokenLogprob, ...] = ()


class Sampler:
    """Chooses tokens as ``Sampling`` says.

    What it draws depends on its own seed and the logits, not on what else is computed.

    Parameters
    ----------
    sampling : Sampling
    prompt : sequence of int
    stop_ids : frozenset of int
        Tokens that end the answer; not before ``min_tokens``.
    grammar : Grammar or None
    """

    def __init__(
        self,
        sampling: Sampling,
        prompt: Sequence[int],
        stop_ids: frozenset[int],
        grammar: Grammar | None,
    ) -> None:
        self._sampling = sampling
        self._stops = torch.tensor(sorted(stop_ids), dtype=torch.int64)
        self._grammar = grammar
        self._counts: Counter[int] = Counter()
        self._seen = list(prompt) if sampling.repetition_penalty != 1.0 else []
        self._num_chosen = 0
        self._warpers = _warpers(sampling)
        self._generator = torch.Generator()
        self._generator.manual_seed(
            secrets.randbits(63) if sampling.seed is None else sampling.seed % 2**63
        )

    @property
    def is_plain(self) -> bool:
        """Whether the likeliest token is the answer, and nothing else is wanted now."""
        sampling = self._sampling
        return (
            sampling.temperature == 0
            and sampling.top_logprobs is None
            and self._grammar is None
            and not sampling.logit_bias
            and sampling.presence_penalty == sampling.frequency_penalty == 0
            and sampling.repetition_penalty == 1.0
            and (self._num_chosen >= sampling.min_tokens or not len(self._stops))
        )

    def choose(self, logits: Tensor) -> tuple[int, float | None, tuple[TokenLogprob, ...]]:
        """Return the next token, its log-probability, and the likeliest ones'.

        Parameters
        ----------
        logits : Tensor, shape (vocab_size,), float32
            On the CPU; not changed.
        """
        scores = self._adjusted(logits.clone())
        if self._sampling.temperature == 0:
            token = int(scores.argmax())
        else:
            none = torch.empty(1, 0, dtype=torch.int64)
            # The best at 0, so that no temperature, however low, makes any infinite.
            scores = scores.nan_to_num(nan=-torch.inf, neginf=-torch.inf)
            scores -= scores.max()
            warped = self._warpers(cast("torch.LongTensor", none), scores[None])[0]
            token = int(torch.multinomial(warped.softmax(-1), 1, generator=self._generator))
        num_tops = self._sampling.top_logprobs
        if num_tops is None:
            return token, None, _NO_TOPS
        own = logits.log_softmax(-1)
        return token, float(own[token]), likeliest(own, num_tops)

    def note(self, token: int) -> bool:
        """Take a token for chosen; return whether the grammar allows nothing after it."""
        self._num_chosen += 1
        self._counts[token] += 1
        if self._seen:
            self._seen.append(token)
        return self._grammar is not None and self._grammar.accept(token)

    def _adjusted(self, scores: Tensor) -> Tensor:
        sampling = self._sampling
        if sampling.repetition_penalty != 1.0 and self._seen:
            penalty = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)
            seen = torch.tensor([self._seen])
            scores = penalty(seen, scores[None])[0]
        if self._counts and (sampling.presence_penalty or sampling.frequency_penalty):
            ids = torch.tensor(list(self._counts))
            counts = torch.tensor(list(self._counts.values()), dtype=scores.dtype)
            scores[ids] -= sampling.presence_penalty + sampling.frequency_penalty * counts
        if sampling.logit_bias:
            ids = torch.tensor(list(sampling.logit_bias))
            scores[ids] += torch.tensor(list(sampling.logit_bias.values()), dtype=scores.dtype)
        if self._num_chosen < sampling.min_tokens:
            scores[self._stops] = -torch.inf
        if self._grammar is not None:
            scores = self._grammar.mask(scores)
        return scores


def likeliest(logprobs: Tensor, count: int) -> tuple[TokenLogprob, ...]:
    """Return the likeliest tokens of a row of log-probabilities, best first."""
    if not count:
        return _NO_TOPS
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return tuple(map(TokenLogprob, ids.tolist(), values.tolist()))


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    found = LogitsProcessorList()
    if sampling.temperature not in (0, 1):
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        found.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(TopPLogitsWarper(float(sampling.top_p)))
    if sampling.min_p > 0:
        found.append(MinPLogitsWarper(float(sampling.min_p)))
    return found
