"""OVO-Bench (arXiv 2501.05510): ``ovo_bench_new.json``, twelve tasks in one list."""

from pathlib import Path, PurePosixPath

from offload.video.choices import plain_choices
from offload.video.dataset_fields import Fields, read_objects
from offload.video.dataset_items import Item, ItemList
from offload.video.types import Question

BACKWARD_TASKS = ("EPM", "ASI", "HLD")
REALTIME_TASKS = ("OCR", "ACR", "ATR", "STU", "FPD", "OJR")
FORWARD_TASKS = ("REC", "SSR", "CRR")


def read_ovobench(path: Path, data_root: Path | None = None) -> list[Item]:
    """Return the items of OVO-Bench, one for each source video.

    The official harness cuts a clip ``ID.mp4`` or ``ID_N.mp4`` for every query; here the source
    video is encoded once, and the query is asked at the second at which that clip ends. Ids are
    the names of the clips. What is right is the option at ``gt``: ``answer`` often words it
    differently. Forward questions are asked openly, for a number or for yes or no.

    Parameters
    ----------
    path : Path
        A JSON list.
    data_root : Path or None
        Folder of the source videos; see ``find_video``.

    Raises
    ------
    ConfigError
        Names file, entry and field.
    """
    items = ItemList(data_root)
    for entry in read_objects(path):
        video = PurePosixPath(entry.text("video"))
        video_id = str(video.parent / video.stem)
        for question in _questions(entry):
            items.add(video_id, str(video), question, task=entry.text("task"), where=entry.where)
    return items.by_video()


def question_ids(entry: Fields) -> list[str]:
    """Return the ids of the questions of an entry: one, or for forward tasks one for each query."""
    number = entry.integer("id")
    if kind_of(entry) != "forward":
        return [str(number)]
    return [f"{number}_{place}" for place in range(len(entry.objects("test_info")))]


def kind_of(entry: Fields) -> str:
    """Return ``"backward"``, ``"realtime"`` or ``"forward"``.

    Raises
    ------
    ConfigError
        The task is none of the twelve.
    """
    task = entry.text("task")
    if task in BACKWARD_TASKS:
        return "backward"
    if task in REALTIME_TASKS:
        return "realtime"
    if task in FORWARD_TASKS:
        return "forward"
    known = ", ".join(BACKWARD_TASKS + REALTIME_TASKS + FORWARD_TASKS)
    raise entry.wrong("task", f"one of {known}")


def _questions(entry: Fields) -> list[Question]:
    ids = question_ids(entry)
    if kind_of(entry) != "forward":
        return [_choice_question(entry, ids[0])]
    asked = _FORWARD[entry.text("task")]
    questions = []
    for name, query in zip(ids, entry.objects("test_info"), strict=True):
        text, answer = asked(entry, query)
        questions.append(Question(name, text, query.time_s("realtime"), answer=answer))
    return questions


def _choice_question(entry: Fields, question_id: str) -> Question:
    choices, right = plain_choices(entry.texts("options")), entry.integer("gt")
    if right >= len(choices):
        raise entry.wrong("gt", f"a place among the {len(choices)} options, from 0")
    return Question(
        id=question_id,
        text=entry.text("question").strip(),
        time_s=entry.time_s("realtime"),
        choices=choices,
        answer=choices[right],
    )


def _repetitions(entry: Fields, query: Fields) -> tuple[str, str]:
    text = f"How many times did they {entry.text('activity')} so far? Answer with one number."
    return text, str(query.integer("count"))


def _step(entry: Fields, query: Fields) -> tuple[str, str]:
    text = f"Is this step being done right now: {query.text('step')}? Answer with Yes or No."
    return text, _yes_no(query)


def _clue(entry: Fields, query: Fields) -> tuple[str, str]:
    question = entry.text("question").strip()
    text = f"{question} Has the video shown enough to answer this? Answer with Yes or No."
    return text, _yes_no(query)


def _yes_no(query: Fields) -> str:
    kind = query.integer("type")
    if kind > 1:
        raise query.wrong("type", "0 for no or 1 for yes")
    return "Yes" if kind else "No"


_FORWARD = {"REC": _repetitions, "SSR": _step, "CRR": _clue}
