"""The nouns of video question answering."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
"""Shape (height, width, 3), RGB."""


class Frame(NamedTuple):
    """One picture of a stream.

    Attributes
    ----------
    time_s : float
        When it is shown, from the beginning of the stream.
    image : ndarray, uint8 [height, width, 3], RGB
    """

    time_s: float
    image: Image


@dataclass(frozen=True, slots=True)
class Question:
    """Something to ask.

    Attributes
    ----------
    id : str
    text : str
    time_s : float or None
        When it is asked; only frames before count. None: when the video has ended.
    choices : tuple of str
        To choose from, if there are any.
    answer : str or None
        What would be right: the text of the right choice, where there are choices.
    windows : tuple of (float, float)
        Seconds from and to, in which the evidence is, where that is known.
    """

    id: str
    text: str
    time_s: float | None = None
    choices: tuple[str, ...] = ()
    answer: str | None = None
    windows: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """A frame that an answer rests on.

    Attributes
    ----------
    time_s : float
    frame : int
        Counted from the beginning of the stream.
    score : float
        Share of the answer's attention to frames, or what retrieval gave it.
    layers : int
        In how many layers it was retrieved.
    """

    time_s: float
    frame: int
    score: float
    layers: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What was answered, and from what.

    Attributes
    ----------
    question : Question
    text : str
    evidence : tuple of Evidence
        The most important first.
    num_frames : int
        Frames that could be seen when it was asked.
    timings_ms : dict of str to float
        ``select``, ``load``, ``first_token``, ``total``.
    bytes_from : dict of str to int
        Read for it, by tier.
    about : dict
        Model and settings.
    """

    question: Question
    text: str
    evidence: tuple[Evidence, ...] = ()
    num_frames: int = 0
    timings_ms: dict[str, float] = field(default_factory=dict)
    bytes_from: dict[str, int] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
