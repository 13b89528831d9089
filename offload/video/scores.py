"""How good answers are, as far as that can be said without another model. Pure functions."""

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from offload.video.choices import normalised, parse_choice, parse_count, parse_yes_no
from offload.video.dataset_fields import Span
from offload.video.types import Evidence, Question

_FRAME_S = 1.0
"""What a frame stands for where one frame only, the first, is known."""


class EvidenceScore(NamedTuple):
    """How well evidence covers the windows in which it should be; all from 0 to 1.

    Attributes
    ----------
    recall : float
        Share of the windows, in seconds, that is covered by frames of the evidence.
    precision : float
        Share of these frames, in seconds, that lies inside a window.
    f1 : float
        Harmonic mean of both.
    first : float
        1 if the most important frame shows any of a window, else 0.
    """

    recall: float
    precision: float
    f1: float
    first: float


def is_right(question: Question, reply: str) -> bool | None:
    """Whether a reply is right, where that can be said.

    Of choices the text decides, so that either of two equal ones is right. Where yes, no or a
    whole number is right, the reply has to say that and nothing else of the kind.

    Returns
    -------
    bool or None
        None: the right answer is not known, or it is open and takes a judge.
    """
    if question.answer is None:
        return None
    if question.choices:
        place = parse_choice(reply, question.choices)
        return place is not None and question.choices[place] == question.answer
    wanted = normalised(question.answer)
    if wanted in ("yes", "no"):
        return parse_yes_no(reply) == (wanted == "yes")
    count = parse_count(wanted) if len(wanted.split()) == 1 else None
    return None if count is None else parse_count(reply) == count


def exact_match(reply: str, answer: str) -> bool:
    """Whether both have the same words, but for case, punctuation and articles."""
    return normalised(reply) == normalised(answer)


def token_f1(reply: str, answer: str) -> float:
    """Return the harmonic mean of the shares of words that reply and answer have in common."""
    said, wanted = normalised(reply).split(), normalised(answer).split()
    if not said or not wanted:
        return float(said == wanted)
    common = (Counter(said) & Counter(wanted)).total()
    return 2 * common / (len(said) + len(wanted))


def evidence_score(
    evidence: Sequence[Evidence], windows: Sequence[Span], frame_s: float | None = None
) -> EvidenceScore:
    """Compare evidence with the windows of a question.

    Parameters
    ----------
    evidence : sequence of Evidence
        The most important first.
    windows : sequence of (float, float)
        Seconds from and to, at least one; they may overlap. One without a length counts as the
        frame that shows it.
    frame_s : float or None
        Seconds that a frame stands for, from its own time on; None: by the times and numbers of
        the frames.

    Notes
    -----
    With frames at every second these are the numbers that ReKV's code has for a mask of retrieved
    frames; there, other rates compare frames with seconds.
    """
    step_s = _frame_s(evidence) if frame_s is None else frame_s
    wanted = _merged(_widened(window, step_s) for window in windows)
    frames = [(seen.time_s, seen.time_s + step_s) for seen in evidence]
    seen = _merged(frames)
    common_s = sum(_overlap_s(span, window) for span in seen for window in wanted)
    recall = common_s / _length_s(wanted) if wanted else 0.0
    precision = common_s / _length_s(seen) if seen else 0.0
    f1 = 2 * recall * precision / (recall + precision) if common_s else 0.0
    is_first = bool(frames) and any(_overlap_s(frames[0], window) > 0 for window in wanted)
    return EvidenceScore(recall, precision, f1, float(is_first))


def percentiles(values: Iterable[float], points: Sequence[int] = (50, 90, 99)) -> dict[str, float]:
    """Return ``{"p50": …, "p90": …, "p99": …}``, linear between neighbours; empty of no values."""
    ordered = sorted(values)
    if not ordered:
        return {}
    return {f"p{point}": _at(ordered, point / 100) for point in points}


def _at(ordered: Sequence[float], share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _frame_s(evidence: Sequence[Evidence]) -> float:
    steps = [seen.time_s / seen.frame for seen in evidence if seen.frame > 0 and seen.time_s > 0]
    return statistics.median(steps) if steps else _FRAME_S


def _widened(window: Span, step_s: float) -> Span:
    if window[0] < window[1]:
        return window
    first_s = window[0] // step_s * step_s
    return first_s, first_s + step_s


def _merged(spans: Iterable[Span]) -> list[Span]:
    merged: list[Span] = []
    for start_s, end_s in sorted(spans):
        if merged and start_s <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end_s, merged[-1][1]))
        else:
            merged.append((start_s, end_s))
    return merged


def _overlap_s(one: Span, other: Span) -> float:
    return max(0.0, min(one[1], other[1]) - max(one[0], other[0]))


def _length_s(spans: Iterable[Span]) -> float:
    return sum(end_s - start_s for start_s, end_s in spans)
