"""A file of answers as numbers: one row for each task and one for all."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from offload.video.answer_records import Record
from offload.video.scores import (
    EvidenceScore,
    evidence_score,
    exact_match,
    is_right,
    percentiles,
    token_f1,
)

ALL = "all"


@dataclass(frozen=True, slots=True)
class TaskScore:
    """What the answers to the questions of one task come to; shares run from 0 to 1.

    A number is None where no question allows it.

    Attributes
    ----------
    task : str
        ``"all"`` for all questions together.
    num_answers : int
    num_judged : int
        Answers that are right or wrong without a judge: choices, yes and no, whole numbers.
    accuracy : float or None
        Share of ``num_judged`` that is right.
    num_open : int
        Other answers for which it is known what would be right; the two below are about these.
    exact, token_f1 : float or None
        Share with the same words, and mean share of common words.
    num_windows : int
        Answers to questions whose evidence is known; ``evidence`` is the mean over these.
    evidence : EvidenceScore or None
    """

    task: str
    num_answers: int
    num_judged: int
    accuracy: float | None
    num_open: int
    exact: float | None
    token_f1: float | None
    num_windows: int
    evidence: EvidenceScore | None


def score_table(records: Iterable[Record], frame_s: float | None = None) -> list[TaskScore]:
    """Return a row for each task in the order of the records, and one for all.

    Of several answers to a question the last counts.

    Parameters
    ----------
    records : iterable of Record
    frame_s : float or None
        Seconds between frames; see ``evidence_score``.
    """
    last = list({record.answer.question.id: record for record in records}.values())
    tasks: dict[str, list[Record]] = {}
    for record in last:
        if record.task is not None:
            tasks.setdefault(record.task, []).append(record)
    return [*(_row(task, some, frame_s) for task, some in tasks.items()), _row(ALL, last, frame_s)]


def latency_table(records: Iterable[Record]) -> dict[str, dict[str, float]]:
    """Return percentiles of milliseconds by the part of the work: ``select``, ``load``, …."""
    values: dict[str, list[float]] = {}
    for record in records:
        for part, milliseconds in record.answer.timings_ms.items():
            values.setdefault(part, []).append(milliseconds)
    return {part: percentiles(some) for part, some in values.items()}


def _row(task: str, records: Sequence[Record], frame_s: float | None) -> TaskScore:
    answers = [record.answer for record in records]
    verdicts = [is_right(answer.question, answer.text) for answer in answers]
    judged = [verdict for verdict in verdicts if verdict is not None]
    open_pairs = [
        (answer.text, answer.question.answer)
        for answer, verdict in zip(answers, verdicts, strict=True)
        if verdict is None and answer.question.answer is not None
    ]
    seen = [
        evidence_score(answer.evidence, answer.question.windows, frame_s)
        for answer in answers
        if answer.question.windows
    ]
    return TaskScore(
        task=task,
        num_answers=len(answers),
        num_judged=len(judged),
        accuracy=_mean(judged),
        num_open=len(open_pairs),
        exact=_mean([exact_match(*pair) for pair in open_pairs]),
        token_f1=_mean([token_f1(*pair) for pair in open_pairs]),
        num_windows=len(seen),
        evidence=EvidenceScore(*map(fmean, zip(*seen, strict=True))) if seen else None,
    )


def _mean(values: Sequence[float]) -> float | None:
    return fmean(values) if values else None
