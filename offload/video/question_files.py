"""Questions of one's own: JSON and JSONL files, and lines that somebody types."""

import re
from collections.abc import Iterator
from pathlib import Path

from offload.errors import ConfigError
from offload.video.choices import plain_choices
from offload.video.dataset_fields import (
    Fields,
    as_objects,
    clock_s,
    parse_json,
    parse_lines,
    read_text,
)
from offload.video.dataset_items import Item, ItemList, in_order
from offload.video.dataset_rekv import answer_among
from offload.video.types import Question

_AT = re.compile(r"(?:/at\s+|@)(\S+)\s+(?=\S)")
_CHOICE_MARK = " | "


def read_questions(path: Path) -> tuple[Question, ...]:
    """Return the questions of a file about one video, by the time they are asked.

    ``.jsonl`` has one object on a line; ``.json`` a list of such objects, or an object with
    ``"questions"``; any other file one question on a line, as in ``typed_question``. The fields::

        {"id": "q1", "t": "12:30", "question": "What is on the table?",
         "choices": ["a cup", "a book"], "answer": "a cup", "windows": [[740, 745.5]]}

    ``question`` is needed, the rest is not. ``t`` is a number of seconds or a time such as
    ``0:12:30``; without it the question is asked at the end. ``answer`` is the text, the letter or
    the place of a choice. Without an ``id`` it is ``q`` and the number in the file, from 1.

    Raises
    ------
    ConfigError
        Names file, entry and field; also for two questions of one id.
    """
    questions: dict[str, Question] = {}
    for question, where in _questions(path):
        if question.id in questions:
            raise ConfigError(f"{where}: the id {question.id!r} is that of an earlier question")
        questions[question.id] = question
    return in_order(questions.values())


def read_question_items(path: Path, data_root: Path | None = None) -> list[Item]:
    """Return the items of a JSON or JSONL file of questions that have a ``video`` each.

    Fields are those of ``read_questions``, ``video`` (a path) and ``task``; an ``id`` is needed, so
    that answers can be matched to questions when the file has grown.

    Raises
    ------
    ConfigError
        Names file, entry and field.
    """
    items = ItemList(data_root)
    for entry in _entries(path):
        question, video = question_of(entry, entry.text("id")), entry.text("video")
        task = entry.optional(entry.text, "task")
        items.add(video, video, question, task=task, where=entry.where)
    return items.by_video()


def typed_question(line: str, question_id: str, now_s: float | None = None) -> Question:
    """Return the question of a line that somebody typed.

    ``/at 12:30 what was on the table`` and ``@12:30 what was on the table`` ask at that time,
    other lines ask at ``now_s``. Text after ``|`` are choices: ``which hand? | left | right``.

    Parameters
    ----------
    line : str
    question_id : str
    now_s : float or None
        Seconds from the beginning of the stream; None: at its end.

    Raises
    ------
    ConfigError
        There is no question in it, one choice only, or no time after ``/at``.
    """
    stripped = line.strip()
    match = _AT.match(stripped)
    if match:
        try:
            now_s = clock_s(match[1])
        except ValueError as error:
            raise ConfigError(f"{line!r}: {error}") from error
        stripped = stripped[match.end() :]
    text, *choices = [part.strip() for part in stripped.split(_CHOICE_MARK)]
    if not text or text.startswith(("/", "@")):
        raise ConfigError(f"{line!r} has no question in it")
    if len(choices) == 1 or not all(choices):
        raise ConfigError(f"{line!r}: two choices or more are needed after '|', none of them empty")
    return Question(question_id, text, time_s=now_s, choices=plain_choices(choices))


def _questions(path: Path) -> Iterator[tuple[Question, str]]:
    if path.suffix in (".json", ".jsonl"):
        for number, entry in enumerate(_entries(path), start=1):
            name = entry.text("id") if entry.has("id") else f"q{number}"
            yield question_of(entry, name), entry.where
        return
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    for number, line in enumerate(lines, start=1):
        yield typed_question(line, f"q{number}"), f"{path}: question {number}"


def _entries(path: Path) -> list[Fields]:
    if path.suffix == ".jsonl":
        return parse_lines(read_text(path), str(path))
    value = parse_json(read_text(path), str(path))
    return as_objects(value.get("questions") if isinstance(value, dict) else value, str(path))


def question_of(entry: Fields, name: str) -> Question:
    """Return the question of an object, under a name; see ``read_questions``.

    Raises
    ------
    ConfigError
        Names the field.
    """
    choices = plain_choices(entry.texts("choices")) if entry.has("choices") else ()
    return Question(
        id=name,
        text=entry.text("question").strip(),
        time_s=entry.optional(entry.time_s, "t"),
        choices=choices,
        answer=answer_among(entry, choices),
        windows=entry.spans("windows") if entry.has("windows") else (),
    )
