"""Ask a model about facts hidden in a long document, on any cache. Prints nothing."""

import copy
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from offload.cache import OffloadedCache
from offload.errors import ConfigError
from offload.prefill import prefill
from offload.recall_data import MAX_ANSWER_TOKENS, Fact, RecallDocument, is_correct

DEVICE_SHARE, HOST_SHARE = 0.10, 0.15
"""Shares of a document's KV cache that device and host may hold: most of it must go to the disk."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said about one fact.

    Attributes
    ----------
    fact : Fact
    text : str
        What was generated, up to and with the first closing bracket.
    token_ids : tuple of int
        All that was generated.
    is_correct : bool
        Whether it is the whole value of the fact.
    """

    fact: Fact
    text: str
    token_ids: tuple[int, ...]
    is_correct: bool


@dataclass(frozen=True, slots=True)
class Session:
    """One document and its questions on one cache.

    Attributes
    ----------
    answers : tuple of Answer
    read_tokens, answer_tokens : int
        Tokens of the document, and tokens generated in all answers.
    read_s, answer_s : float
        Time for them. A question's few tokens count toward its answer; copying the cache does not.
    """

    answers: tuple[Answer, ...]
    read_tokens: int
    read_s: float
    answer_tokens: int
    answer_s: float


class Reader:
    """Reads one document into any cache, and asks about it.

    Parameters
    ----------
    model, tokenizer
    document : RecallDocument
    piece_tokens : int
        Tokens per forward pass while reading.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        document: RecallDocument,
        piece_tokens: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._document = document
        self._piece_tokens = piece_tokens

    def run(self, cache: Cache, facts: Sequence[Fact], advance: Callable[[int], None]) -> Session:
        """Read the document into an empty cache, then ask for one fact after the other.

        Every question is asked on a copy of the cache, as one does with a shared prefix, so that no
        question sees another. Copies of an ``OffloadedCache`` share its chunks.

        Parameters
        ----------
        cache : Cache
            Holds the document afterwards.
        facts : sequence of Fact
            What to ask for.
        advance : callable
            Told after each forward pass how many tokens were read.
        """
        started = time.perf_counter()
        document = self._tensor(self._document.token_ids)
        prefill(self._model, cache, document, self._piece_tokens, advance)
        read_s = time.perf_counter() - started
        answers, answer_s = [], 0.0
        for fact in facts:
            with _copied(cache) as own:
                started = time.perf_counter()
                token_ids = self.ask(own, fact)
                answer_s += time.perf_counter() - started
            answers.append(self._answer(fact, token_ids))
        num_answer_tokens = sum(len(answer.token_ids) for answer in answers)
        num_read = len(self._document.token_ids)
        return Session(tuple(answers), num_read, read_s, num_answer_tokens, answer_s)

    def ask(self, cache: Cache, fact: Fact) -> list[int]:
        """Return what is generated, greedily, after the document and the question for a fact.

        The cache holds the document; the question and the answer are added to it.
        """
        prompt = self._tensor([*self._document.token_ids, *self._document.question(fact)])
        generate: Any = self._model.generate  # mypy does not see it on PreTrainedModel
        generated = generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            past_key_values=cache,
            max_new_tokens=MAX_ANSWER_TOKENS,
            do_sample=False,
        )
        answer: list[int] = generated[0, prompt.shape[1] :].tolist()
        return answer

    def _tensor(self, token_ids: list[int]) -> Tensor:
        return torch.tensor([token_ids], device=self._model.device)

    def _answer(self, fact: Fact, token_ids: list[int]) -> Answer:
        value, bracket, _ = str(self._tokenizer.decode(token_ids)).partition("]")
        return Answer(fact, value + bracket, tuple(token_ids), is_correct(fact, token_ids))


def choose_facts(document: RecallDocument, num_questions: int, seed: int) -> list[Fact]:
    """Draw the facts to ask for, in the order of the questions.

    Raises
    ------
    ConfigError
        The document has fewer facts.
    """
    if num_questions > len(document.facts):
        raise ConfigError(
            f"{num_questions} questions need as many facts, but the document hides "
            f"{len(document.facts)}"
        )
    return random.Random(seed).sample(document.facts, num_questions)


def kv_bytes(model: PreTrainedModel, num_tokens: int) -> int:
    """Return the bytes of the keys and values of so many tokens in all layers."""
    config = model.config.get_text_config(decoder=True)
    elements: int = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return num_tokens * elements * model.dtype.itemsize


def small_capacity(cache_bytes: int) -> dict[str, int | str]:
    """Return capacities of device and host that leave most of ``cache_bytes`` to the disk."""
    return {"gpu": int(cache_bytes * DEVICE_SHARE), "cpu": int(cache_bytes * HOST_SHARE)}


@contextmanager
def _copied(cache: Cache) -> Iterator[Cache]:
    own = copy.deepcopy(cache)
    try:
        yield own
    finally:
        if isinstance(own, OffloadedCache):
            own.close()
