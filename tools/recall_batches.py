"""Training sequences of the recall model: a haystack with records in it, then questions, answered.

The haystack is real text from the training half of the corpus, or random words, or random
characters, so that the model cannot learn to tell records from text by the look of the text. Some
sequences are hard: keys that differ in one letter, values that start alike.
"""

import random
from dataclasses import dataclass, replace
from string import ascii_letters, ascii_lowercase, digits, punctuation
from typing import Final

import torch
from torch import Tensor

from offload.recall_data import (
    KEY_LETTERS,
    VALUE_DIGITS,
    Fact,
    corpus,
    encode,
    hide,
    random_facts,
)

MAX_QUESTIONS: Final = 24
MAX_RECORD_TOKENS: Final = len(Fact("a" * KEY_LETTERS, "0" * max(VALUE_DIGITS)).record)
HARD_SHARE: Final = 0.3
CHARACTERS: Final = ascii_letters + digits + punctuation + " \n"


@dataclass(frozen=True, slots=True)
class Batch:
    """Sequences to train on.

    Attributes
    ----------
    token_ids : Tensor, shape (batch, length), int64
    is_answer : Tensor, shape (batch, length), bool
        Tokens that the model has to produce; the loss is on these alone.
    """

    token_ids: Tensor
    is_answer: Tensor


class BatchMaker:
    """An endless supply of training sequences, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._text = corpus("train")

    def batch(self, num_sequences: int, num_tokens: int) -> Batch:
        """Make sequences of exactly ``num_tokens`` tokens each."""
        rows = [self._sequence(num_tokens) for _ in range(num_sequences)]
        return Batch(
            torch.tensor([token_ids for token_ids, _ in rows]),
            torch.tensor([is_answer for _, is_answer in rows]),
        )

    def _sequence(self, num_tokens: int) -> tuple[list[int], list[bool]]:
        rng = self._rng
        # Up to a third of the sequence asks, up to a third is records, the rest is haystack.
        most = num_tokens // (3 * MAX_RECORD_TOKENS)
        facts = self._facts(rng.randint(max(1, most // 4), most))
        questions = rng.sample(facts, min(len(facts), MAX_QUESTIONS))
        num_records = sum(len(fact.record) for fact in [*facts, *questions])
        document = hide(facts, self._haystack(num_tokens - 1 - num_records), rng)
        token_ids = list(document.token_ids)
        is_answer = [False] * len(token_ids)
        for fact in questions:
            token_ids += encode(fact.record)
            is_answer += [False] * len(fact.prompt) + [True] * len(fact.answer)
        return token_ids, is_answer

    def _facts(self, num_facts: int) -> list[Fact]:
        facts = random_facts(num_facts, self._rng)
        if self._rng.random() >= HARD_SHARE:
            return facts
        taken = {fact.key for fact in facts}
        for index in range(1, num_facts, 2):
            twin = self._twin(facts[index - 1])
            if twin.key not in taken:
                taken.add(twin.key)
                facts[index] = twin
        return facts

    def _twin(self, fact: Fact) -> Fact:
        """Return a fact whose key differs in one letter and whose value starts alike."""
        rng = self._rng
        place = rng.randrange(KEY_LETTERS)
        key = fact.key[:place] + rng.choice(ascii_lowercase) + fact.key[place + 1 :]
        shared = rng.randint(1, len(fact.value) - 1)
        value = fact.value[:shared] + "".join(rng.choices(digits, k=len(fact.value) - shared))
        return replace(fact, key=key, value=value)

    def _haystack(self, num_tokens: int) -> str:
        rng = self._rng
        kind = rng.random()
        if kind < 0.5:
            start = rng.randrange(len(self._text) - num_tokens)
            return self._text[start : start + num_tokens]
        if kind < 0.8:
            words = (
                "".join(rng.choices(ascii_lowercase, k=rng.randint(1, 9)))
                for _ in range(num_tokens)
            )
            return " ".join(words)[:num_tokens]
        return "".join(rng.choices(CHARACTERS, k=num_tokens))
