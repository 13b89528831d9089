"""Documents with hidden records, and questions about them.

A record is a line such as ``[qmzk:48213]``: a key of four letters and a value of four to six
digits. Records are hidden at random places of real text; the question repeats the start of one, and
the right answer is the rest of it. A token is a byte (see ``docs/recall-model.md``), so documents
are exact in length and nothing here needs a tokenizer. Knows no model.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from string import ascii_lowercase, digits
from typing import Final, Literal

from offload.errors import ConfigError

BOS_TOKEN_ID: Final = 256
"""First token of every document. Ids below it are byte values."""

KEY_LETTERS: Final = 4
VALUE_DIGITS: Final = (4, 5, 6)
MAX_ANSWER_TOKENS: Final = max(VALUE_DIGITS) + 1
"""Tokens of the longest answer: its digits and the closing bracket."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One hidden record.

    Attributes
    ----------
    key : str
        Four lower-case letters, unique in the document.
    value : str
        Four to six decimal digits.
    position : int
        Index in the document of the first token of the record.
    """

    key: str
    value: str
    position: int = 0

    @property
    def prompt(self) -> str:
        """What the record starts with, up to its value. Also the question about it."""
        return f"\n[{self.key}:"

    @property
    def answer(self) -> str:
        """What the record ends with: its value and the closing bracket."""
        return f"{self.value}]"

    @property
    def record(self) -> str:
        """The record as it stands in the document."""
        return self.prompt + self.answer


@dataclass(frozen=True, slots=True)
class RecallDocument:
    """Real text with records in it.

    Attributes
    ----------
    token_ids : list of int
        ``BOS_TOKEN_ID``, then one id per byte.
    facts : tuple of Fact
        In the order in which they stand in the document.
    """

    token_ids: list[int]
    facts: tuple[Fact, ...]

    def question(self, fact: Fact) -> list[int]:
        """Return the token ids to append to the document in order to ask for ``fact``."""
        return encode(fact.prompt)


def encode(text: str) -> list[int]:
    """Return the token ids of a text, without ``BOS_TOKEN_ID``."""
    return list(text.encode())


def is_correct(fact: Fact, generated_ids: Sequence[int]) -> bool:
    """Whether generated tokens start with the whole value of a fact and the closing bracket.

    Parameters
    ----------
    fact : Fact
    generated_ids : sequence of int
        What the model produced after the question, at least ``MAX_ANSWER_TOKENS`` of it. What
        follows the bracket is not looked at.
    """
    answer = encode(fact.answer)
    return list(generated_ids[: len(answer)]) == answer


def build_document(num_tokens: int, num_facts: int, seed: int) -> RecallDocument:
    """Hide records in a passage of the held-out text, which the recall model has never seen.

    The passage starts at a random place and is contiguous: no part of it is repeated. The same
    arguments give the same document on every machine.

    Parameters
    ----------
    num_tokens : int
        Exact length of the document.
    num_facts : int
        Records to hide. About one per 100 tokens is what the accuracies in the documentation
        were measured with.
    seed : int
        Decides passage, keys, values and places.

    Raises
    ------
    ConfigError
        The records do not fit into ``num_tokens``, there is not enough text to fill it, or
        ``num_facts`` is negative.
    """
    if num_facts < 0:
        raise ConfigError(f"a document cannot hold {num_facts} facts")
    rng = random.Random(seed)
    facts = random_facts(num_facts, rng)
    num_text = num_tokens - 1 - sum(len(fact.record) for fact in facts)
    if num_text < 0:
        raise ConfigError(
            f"{num_facts} facts need {num_tokens - num_text} tokens, "
            f"but the document is to have {num_tokens}"
        )
    text = corpus("heldout")
    if num_text > len(text):
        raise ConfigError(
            f"a document of {num_tokens} tokens with {num_facts} facts needs {num_text} bytes of "
            f"text, but the held-out corpus has {len(text)}"
        )
    start = rng.randrange(len(text))
    passage = (text + text)[start : start + num_text]
    return hide(facts, passage, rng)


def random_facts(num_facts: int, rng: random.Random) -> list[Fact]:
    """Draw facts with distinct keys; their positions are not set yet.

    Raises
    ------
    ConfigError
        There are not that many keys.
    """
    num_keys = len(ascii_lowercase) ** KEY_LETTERS
    if num_facts > num_keys:
        raise ConfigError(f"{num_facts} facts need as many keys, but there are only {num_keys}")
    keys: dict[str, None] = {}
    while len(keys) < num_facts:
        keys["".join(rng.choices(ascii_lowercase, k=KEY_LETTERS))] = None
    return [Fact(key, "".join(rng.choices(digits, k=rng.choice(VALUE_DIGITS)))) for key in keys]


def hide(facts: Sequence[Fact], text: str, rng: random.Random) -> RecallDocument:
    """Put records at random places of an ASCII text, ``BOS_TOKEN_ID`` before all."""
    cuts = sorted(rng.randint(0, len(text)) for _ in facts)
    pieces: list[str] = []
    placed: list[Fact] = []
    position, previous = 1, 0
    for fact, cut in zip(facts, cuts, strict=True):
        position += cut - previous
        placed.append(Fact(fact.key, fact.value, position))
        pieces += [text[previous:cut], fact.record]
        position += len(fact.record)
        previous = cut
    pieces.append(text[previous:])
    return RecallDocument([BOS_TOKEN_ID, *encode("".join(pieces))], tuple(placed))


def corpus(part: Literal["train", "heldout"]) -> str:
    """Read one part of the corpus, its files joined in the order of their names.

    Returns
    -------
    str
        ASCII text: characters, bytes and tokens are the same number.
    """
    folder = resources.files("offload") / "assets" / "corpus" / part
    files = sorted(folder.iterdir(), key=lambda file: file.name)
    return "".join(file.read_text("ascii") for file in files)
