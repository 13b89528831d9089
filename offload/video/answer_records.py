"""An answer as a JSON object, and back."""

import json
from typing import Any, NamedTuple

import numpy as np

from offload.video.choices import letter_of, parse_choice
from offload.video.dataset_fields import Fields
from offload.video.scores import is_right
from offload.video.types import Answer, Evidence, Question

_TIMINGS = {
    "select": "retrieval_ms",
    "load": "load_ms",
    "model": "model_ms",
    "first_token": "ttft_ms",
    "total": "total_ms",
}
_ABOUT = ("model", "coverage")
"""What of ``Answer.about`` has a field of its own; the rest are settings."""


class Record(NamedTuple):
    """A line of a file of answers.

    Attributes
    ----------
    answer : Answer
    video_id : str or None
    task : str or None
    """

    answer: Answer
    video_id: str | None = None
    task: str | None = None


def to_line(record: Record) -> bytes:
    """Return a record as one line of JSON, newline included.

    Raises
    ------
    ValueError
        A number in it is not finite.
    """
    text = json.dumps(to_object(record), ensure_ascii=False, allow_nan=False, default=_plain)
    # Half of a surrogate pair is no UTF-8, but its escape is JSON.
    return text.encode("utf-8", "backslashreplace") + b"\n"


def to_object(record: Record) -> dict[str, Any]:
    """Return the fields of a record; ``docs/video-benchmarks.md`` lists them."""
    answer, question = record.answer, record.answer.question
    place = parse_choice(answer.text, question.choices)
    return {
        "id": question.id,
        "video": record.video_id,
        "task": record.task,
        "t": question.time_s,
        "question": question.text,
        "choices": question.choices,
        "expected": question.answer,
        "windows": question.windows,
        "answer": answer.text,
        "choice": None if place is None else letter_of(place),
        "correct": is_right(question, answer.text),
        "evidence": [
            {"t": seen.time_s, "frame": seen.frame, "score": seen.score, "layers": seen.layers}
            for seen in answer.evidence
        ],
        "frames_seen": answer.num_frames,
        **{name: answer.timings_ms.get(key) for key, name in _TIMINGS.items()},
        "other_ms": {k: ms for k, ms in answer.timings_ms.items() if k not in _TIMINGS},
        "bytes_from": answer.bytes_from,
        **{name: answer.about.get(name) for name in _ABOUT},
        "settings": {name: value for name, value in answer.about.items() if name not in _ABOUT},
    }


def from_object(fields: Fields) -> Record:
    """Return the record of an object; ``choice`` and ``correct`` are not read.

    Raises
    ------
    ConfigError
        Names file, line and field.
    """
    answer = Answer(
        question=Question(
            id=fields.text("id"),
            text=fields.string("question"),
            time_s=fields.optional(fields.number, "t"),
            choices=fields.texts("choices"),
            answer=fields.optional(fields.string, "expected"),
            windows=fields.spans("windows"),
        ),
        text=fields.string("answer"),
        evidence=tuple(map(_evidence, fields.objects("evidence"))),
        num_frames=fields.integer("frames_seen"),
        timings_ms=_timings_ms(fields),
        bytes_from={name: int(size) for name, size in fields.numbers("bytes_from").items()},
        about=_about(fields),
    )
    return Record(
        answer, fields.optional(fields.string, "video"), fields.optional(fields.string, "task")
    )


def _timings_ms(fields: Fields) -> dict[str, float]:
    known = {key: fields.number(name) for key, name in _TIMINGS.items() if fields.has(name)}
    return known | fields.numbers("other_ms")


def _about(fields: Fields) -> dict[str, Any]:
    known = {name: fields.values[name] for name in _ABOUT if fields.has(name)}
    return known | fields.nested("settings").values


def _evidence(fields: Fields) -> Evidence:
    return Evidence(
        fields.number("t"), fields.integer("frame"), fields.real("score"), fields.integer("layers")
    )


def _plain(value: object) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)
