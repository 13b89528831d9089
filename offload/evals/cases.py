"""What is asked about a document, in a form that any task and any model can have."""

from collections.abc import Sequence
from dataclasses import dataclass

PREVIOUS = "{previous}"
"""In a turn's text: what the model answered in the turn before."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One question, which follows all that was said before it.

    Attributes
    ----------
    text : str
        May contain ``PREVIOUS``.
    expected : tuple of str
        What a right answer contains; empty where the turn only leads to the next one.
    starts : bool
        A right answer starts with what is expected; else it contains all of it somewhere.
    max_tokens : int
        Generated at most.
    stop : str
        Generation ends when this was generated.
    """

    text: str
    expected: tuple[str, ...]
    starts: bool = True
    max_tokens: int = 8
    stop: str = "]"

    def score(self, answer: str) -> float:
        """Return the share of what is expected that an answer has."""
        if self.starts:
            return float(all(answer.startswith(text) for text in self.expected))
        return sum(text in answer for text in self.expected) / len(self.expected)


@dataclass(frozen=True, slots=True)
class Case:
    """One document, and conversations about it that know nothing of each other.

    Attributes
    ----------
    task : str
    document : str
        Read exactly, once.
    conversations : sequence of sequence of Turn
    """

    task: str
    document: str
    conversations: Sequence[Sequence[Turn]]
