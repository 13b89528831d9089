"""Result files of the benchmarks that come in ReKV's shape."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offload.video.choices import letter_of, parse_choice
from offload.video.dataset_rekv import read_rekv
from offload.video.results import NO_LETTER, Result, chosen_letter
from offload.video.scores import evidence_score
from offload.video.types import Answer, Question

_REKV_SETTINGS = {"retrieve_size": 64, "chunk_size": 1}
"""Rows of other settings are passed over by ReKV's ``eval_open_ended.py``."""

_GROUNDED = 0.5
"""Precision of the evidence from which a right answer counts as grounded, as in NExT-GQA."""


def rekv_csv(annotations: Path, answers: Mapping[str, Answer], model: str) -> Result:
    """Return ``results.csv`` of ReKV, for its ``eval_multiple_choice.py`` and its two sisters.

    Scores of choices and of evidence are percent. Evidence is scored only where the annotations
    have windows. Questions without an answer have no row.
    """
    rows, missing = [], []
    for item in read_rekv(annotations):
        for question in item.questions:
            if question.id not in answers:
                missing.append(question.id)
                continue
            row = {"video_id": item.video_id} | _rekv_row(question, answers[question.id])
            if question.id in item.tasks:
                row["task"] = item.tasks[question.id]
            rows.append(row | _REKV_SETTINGS)
    return Result(_csv(rows), len(rows), tuple(missing))


def egoschema_csv(annotations: Path, answers: Mapping[str, Answer], model: str) -> Result:
    """Return the submission of EgoSchema, ``q_uid,answer`` with places from 0.

    A reply that names no choice becomes 0, as in ReKV; no other number would be accepted.
    """
    rows, missing = [], []
    for item in read_rekv(annotations):
        for question in item.questions:
            if question.id in answers:
                place = parse_choice(answers[question.id].text, question.choices)
                rows.append({"q_uid": item.video_id, "answer": place or 0})
            else:
                missing.append(question.id)
    return Result(_csv(rows), len(rows), tuple(missing))


def _rekv_row(question: Question, answer: Answer) -> dict[str, Any]:
    if not question.choices:
        reply = answer.text.replace("\n", " ").strip()
        return {"question": question.text, "answer": question.answer, "pred_answer": reply}
    letter = chosen_letter(answer.text, question.choices) or NO_LETTER
    right = question.answer and letter_of(question.choices.index(question.answer))
    accuracy = 100.0 * (letter == right)
    row = {
        "question": question.text,
        "choices": list(question.choices),
        "answer": question.answer,
        "correct_choice": right,
        "pred_answer": letter,
        "pred_choice": letter,
        "qa_acc": accuracy,
    }
    if question.windows:
        score = evidence_score(answer.evidence, question.windows)
        row |= {name: 100 * getattr(score, name) for name in ("recall", "precision", "f1")}
        row["acc_at_gqa"] = accuracy if score.precision >= _GROUNDED else 0.0
    return row


def _csv(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    file = io.StringIO()
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()
