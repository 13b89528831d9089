"""The list of videos and conversations in which ReKV keeps its benchmarks, and its forks theirs.

RVS-Ego and RVS-Movie (``start_time``, ``end_time``), QAEgo4D (``temporal_windows``), MLVU,
EgoSchema, CG-Bench (``choices``) and ActivityNet-QA differ only in the fields of a question.
"""

from collections import Counter
from pathlib import Path

from offload.video.choices import place_of, plain_choices
from offload.video.dataset_fields import Fields, Span, read_objects
from offload.video.dataset_items import Item, ItemList
from offload.video.types import Question


def read_rekv(path: Path, data_root: Path | None = None) -> list[Item]:
    """Return the items of an annotation file of ReKV.

    A question with ``end_time`` is asked then, others at the end of the video. Ids are
    ``VIDEO/N``, counted from 0 through everything that the file has about the video. Entries of
    the same ``video_id`` are one item: MLVU has videos in the folders of two tasks.

    Parameters
    ----------
    path : Path
        A JSON list.
    data_root : Path or None
        Folder of the videos; see ``find_video``.

    Raises
    ------
    ConfigError
        Names file, entry and field.
    """
    items, counts = ItemList(data_root), Counter[str]()
    for entry in read_objects(path):
        video_id, video = entry.text("video_id"), entry.text("video_path")
        duration_s = entry.optional(entry.number, "duration")
        for asked in entry.objects("conversations"):
            question = _question(asked, f"{video_id}/{counts[video_id]}")
            counts[video_id] += 1
            items.add(
                video_id,
                video,
                question,
                task=_task(asked),
                duration_s=duration_s,
                where=asked.where,
            )
    return items.by_video()


def answer_among(asked: Fields, choices: tuple[str, ...], name: str = "answer") -> str | None:
    """Return the right choice of a field that has its text, letter or place; None without one.

    Raises
    ------
    ConfigError
        There is no such choice.
    """
    if not asked.has(name):
        return None
    if not choices:
        return asked.text(name)
    is_place = isinstance(asked.values[name], int)
    place = place_of(asked.integer(name) if is_place else asked.text(name), choices)
    if place is None:
        raise asked.wrong(name, f"one of the {len(choices)} choices, its letter or its place")
    return choices[place]


def _question(asked: Fields, question_id: str) -> Question:
    choices = plain_choices(asked.texts("choices")) if asked.has("choices") else ()
    return Question(
        id=question_id,
        text=asked.text("question").strip(),
        time_s=asked.optional(asked.time_s, "end_time"),
        choices=choices,
        answer=answer_among(asked, choices),
        windows=_windows(asked),
    )


def _windows(asked: Fields) -> tuple[Span, ...]:
    # The start_time of RVS is that of the clip that its question was written for.
    return asked.spans("temporal_windows") if asked.has("temporal_windows") else ()


def _task(asked: Fields) -> str | None:
    if not asked.has("question_type"):
        return None
    is_number = isinstance(asked.values["question_type"], int)
    return str(asked.integer("question_type")) if is_number else asked.text("question_type")
