import subprocess
import sys

import pytest

from offload.video.answer_records import Record
from offload.video.score_table import latency_table, score_table
from offload.video.scores import (
    EvidenceScore,
    evidence_score,
    exact_match,
    is_right,
    percentiles,
    token_f1,
)
from offload.video.types import Answer, Evidence, Question

COLOURS = ("red", "blue", "red", "green")


def frames(*numbers: int, step_s: float = 1.0) -> tuple[Evidence, ...]:
    return tuple(Evidence(number * step_s, number, 0.1, 1) for number in numbers)


def asked(answer: str | None, choices: tuple[str, ...] = ()) -> Question:
    return Question("q", "What?", choices=choices, answer=answer)


@pytest.mark.parametrize(
    ("answer", "choices", "reply", "right"),
    [
        ("blue", COLOURS, "(B)", True),
        ("blue", COLOURS, "C", False),
        ("red", COLOURS, "C", True),
        ("blue", COLOURS, "none of these", False),
        ("Yes", (), "yes, it is", True),
        ("no", (), "Yes.", False),
        ("no", (), "not yet", False),
        ("3", (), "Three times.", True),
        ("three", (), "3", True),
        ("3", (), "2 or 3", False),
        ("3 cups", (), "3 cups", None),
        ("a red cup", (), "a red cup", None),
        (None, COLOURS, "A", None),
        (None, (), "A", None),
    ],
)
def test_reply_is_right_wrong_or_left_to_a_judge(
    answer: str | None, choices: tuple[str, ...], reply: str, right: bool | None
) -> None:
    assert is_right(asked(answer, choices), reply) is right


@pytest.mark.parametrize(
    ("reply", "answer", "f1", "exact"),
    [
        ("The red cup.", "a red cup", 1.0, True),
        ("red cup", "red cup on shelf", 2 / 3, False),
        ("cup cup", "cup", 2 / 3, False),
        ("blue", "red", 0.0, False),
        ("", "red", 0.0, False),
        ("", "the", 1.0, True),
    ],
)
def test_words_in_common_are_counted_without_case_articles_and_punctuation(
    reply: str, answer: str, f1: float, exact: bool
) -> None:
    assert token_f1(reply, answer) == pytest.approx(f1)
    assert exact_match(reply, answer) is exact


@pytest.mark.parametrize(
    ("evidence", "windows", "recall", "precision", "first"),
    [
        (frames(4, 5), [(4, 6)], 1.0, 1.0, 1.0),
        (frames(5, 9), [(4, 6)], 0.5, 0.5, 1.0),
        (frames(9, 5), [(4, 6)], 0.5, 0.5, 0.0),
        (frames(5, 5), [(4, 6)], 0.5, 1.0, 1.0),
        (frames(4), [(4.25, 4.75)], 1.0, 0.5, 1.0),
        (frames(3, 6), [(4, 6)], 0.0, 0.0, 0.0),
        (frames(1), [(0, 2), (1, 3)], 1 / 3, 1.0, 1.0),
        (frames(4), [(4.5, 4.5)], 1.0, 1.0, 1.0),
        ((), [(4, 6)], 0.0, 0.0, 0.0),
        (frames(0), [(0, 1)], 1.0, 1.0, 1.0),
    ],
)
def test_evidence_is_scored_by_seconds_inside_of_the_windows(
    evidence: tuple[Evidence, ...],
    windows: list[tuple[float, float]],
    recall: float,
    precision: float,
    first: float,
) -> None:
    score = evidence_score(evidence, windows)
    assert score[:2] == pytest.approx((recall, precision))
    assert score.f1 == pytest.approx(
        2 * recall * precision / (recall + precision) if recall else 0.0
    )
    assert score.first == first


def test_evidence_at_another_rate_counts_the_seconds_its_frames_stand_for() -> None:
    evidence = frames(2, 3, step_s=2.0)  # 4 to 8
    assert evidence_score(evidence, [(5, 7)])[:2] == (1.0, 0.5)
    assert evidence_score(evidence, [(5, 7)], frame_s=1.0)[:2] == (0.5, 0.5)


@pytest.mark.parametrize(
    ("values", "points"),
    [
        ([], {}),
        ([7.0], {"p50": 7.0, "p90": 7.0, "p99": 7.0}),
        ([3.0, 1.0, 2.0], {"p50": 2.0, "p90": 2.8, "p99": 2.98}),
        (list(range(101)), {"p50": 50.0, "p90": 90.0, "p99": 99.0}),
    ],
)
def test_percentiles_lie_between_neighbours(values: list[float], points: dict[str, float]) -> None:
    assert percentiles(values) == pytest.approx(points)


def record(name: str, reply: str, task: str | None, **fields: object) -> Record:
    question = Question(name, "What?", **fields)  # type: ignore[arg-type]
    answer = Answer(question, reply, evidence=frames(4), timings_ms={"total": float(len(reply))})
    return Record(answer, "v", task)


RECORDS = [
    record("a", "B", "colour", choices=COLOURS, answer="blue"),
    record("b", "A", "colour", choices=COLOURS, answer="blue", windows=((4.0, 6.0),)),
    record("c", "a red cup", "name", answer="cup"),
    record("d", "no idea", "name"),
    record("a", "A", "colour", choices=COLOURS, answer="blue"),
    record("e", "yes", None, answer="yes"),
]


def test_table_has_a_row_for_each_task_and_one_for_all() -> None:
    colour, name, everything = score_table(RECORDS)
    assert (colour.task, colour.num_answers, colour.num_judged, colour.accuracy) == (
        ("colour", 2, 2, 0.0)
    )
    assert (colour.num_windows, colour.evidence) == (1, EvidenceScore(0.5, 1.0, 2 / 3, 1.0))
    assert (name.num_answers, name.num_judged, name.accuracy) == (2, 0, None)
    assert (name.num_open, name.exact) == (1, 0.0)
    assert name.token_f1 == pytest.approx(2 / 3)
    assert name.evidence is None
    assert (everything.task, everything.num_answers) == ("all", 5)
    assert everything.accuracy == pytest.approx(1 / 3)


def test_table_of_no_answers_has_no_shares() -> None:
    [everything] = score_table([])
    assert (everything.num_answers, everything.accuracy, everything.evidence) == (0, None, None)


def test_latency_table_has_percentiles_of_every_part() -> None:
    assert latency_table(RECORDS[:2]) == {"total": {"p50": 1.0, "p90": 1.0, "p99": 1.0}}


def test_import_of_readers_and_scores_does_not_bring_torch() -> None:
    code = (
        "import sys, offload.video.datasets, offload.video.score_table, offload.video.answer_files"
    )
    checked = f"{code}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", checked], check=False).returncode == 0
