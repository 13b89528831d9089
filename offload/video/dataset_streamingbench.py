"""StreamingBench (arXiv 2411.03628): ``questions_{real,omni,sqa,proactive}[_stream].json``."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from offload.video.choices import parse_yes_no, place_of, printed_letter, without_letter
from offload.video.dataset_fields import Fields, as_objects, parse_json, read_text
from offload.video.dataset_items import Item, ItemList
from offload.video.types import Question

NUM_CHOICES = 4
"""Of every question; what a file has beyond is the rest of a broken line, or a repetition."""

POLLS_PAST_S = 4
"""For so long after the right moment a proactive question is polled."""

_OUTPUT = "/output"
_POLL = " Is it the right time to say "


class Asked(NamedTuple):
    """A question of a file.

    Attributes
    ----------
    id : str
        ``VIDEO/N``, counted from 0 through everything that the file has about the video.
    video_id : str
        File name of the video without its suffix.
    entry, question : Fields
        The object of the video or clip, and the question in it.
    """

    id: str
    video_id: str
    entry: Fields
    question: Fields


def read_real(path: Path, data_root: Path | None = None) -> list[Item]:
    """Return the items of the real-time or of the omni-source questions.

    Parameters
    ----------
    path : Path
        A list of entries; ``sqa`` has lists of entries, which is understood too.
    data_root : Path or None
        Folder of the videos; see ``find_video``.

    Raises
    ------
    ConfigError
        Names file, entry and field.
    """
    return _read(path, data_root, lambda asked: [_choice_question(asked)])


def read_sqa(path: Path, data_root: Path | None = None) -> list[Item]:
    """Return the items of the sequential questions: earlier ones, with answers, are in their text.

    As in the official harness the earlier questions are those before it in the file, and their
    answers the right ones. Parameters and errors are those of ``read_real``.
    """
    told: dict[str, str] = {}

    def with_context(asked: Asked) -> list[Question]:
        question = _choice_question(asked)
        context = told.get(asked.video_id, "")
        stamp = asked.question.text("time_stamp")
        told[asked.video_id] = f"{context}At {stamp}: {question.text} Answer: {question.answer}\n"
        if not context:
            return [question]
        text = f"Asked and answered earlier:\n{context}Now answer this: {question.text}"
        return [replace(question, text=text)]

    return _read(path, data_root, with_context)


def read_proactive(path: Path, data_root: Path | None = None) -> list[Item]:
    """Return the items of the proactive questions: every second, whether it is time to speak.

    Question ``VIDEO/N@T`` is asked at second T, from the second after the request to
    ``POLLS_PAST_S`` after the right moment. After the first yes ``follow_up`` has the question that
    makes the model speak; the polls after that one count no more. Parameters and errors are those
    of ``read_real``.
    """
    return _read(path, data_root, _polls)


def follow_up(question: Question, reply: str) -> Question | None:
    """Return what has to be asked next: after a poll that got a yes, for the output itself.

    Parameters
    ----------
    question : Question
        Any question of this benchmark.
    reply : str
        What was answered.

    Returns
    -------
    Question or None
        Asked at the same time, with the id of the poll and ``/output``.
    """
    if "@" not in question.id or question.id.endswith(_OUTPUT) or not parse_yes_no(reply):
        return None
    text = question.text.partition(_POLL)[0]
    return replace(question, id=question.id + _OUTPUT, text=text)


def output_id(poll_id: str) -> str:
    """Return the id of the question that follows a poll."""
    return poll_id + _OUTPUT


def poll_ids(asked: Asked) -> list[tuple[int, str]]:
    """Return second and id of every poll of a proactive question, by time."""
    start_s = int(asked.question.time_s("time_stamp"))
    end_s = int(asked.question.time_s("ground_truth_time_stamp")) + POLLS_PAST_S
    return [(second, f"{asked.id}@{second}") for second in range(start_s + 1, end_s + 1)]


def load(path: Path) -> Any:
    """Return the value of a question file."""
    return parse_json(read_text(path), str(path))


def walk(data: Any, where: str) -> Iterator[Asked]:
    """Name every question of a file, in its order; what is written into them is in ``data`` too."""
    counts = Counter[str]()
    nested = isinstance(data, list) and bool(data) and isinstance(data[0], list)
    groups = [(data, where)]
    if nested:
        groups = [(group, f"{where}: group {place}") for place, group in enumerate(data)]
    for group, name in groups:
        for entry in as_objects(group, name):
            video_id = PurePosixPath(entry.text("video_path")).stem
            for question in entry.objects("questions"):
                yield Asked(f"{video_id}/{counts[video_id]}", video_id, entry, question)
                counts[video_id] += 1


def options_of(question: Fields) -> tuple[str, ...]:
    """Return the four choices of a question in the order of their letters, without these.

    Some files have options broken into two at a line break, options in the wrong order, or more
    than four. What counts is the printed letter, where each is printed once.
    """
    options = question.texts("options")
    is_lettered = bool(options) and printed_letter(options[0]) == "A"
    if is_lettered and len(list(filter(printed_letter, options))) > 1:
        options = _mended(options)[:NUM_CHOICES]
        if sorted(printed_letter(option) or "" for option in options) == list("ABCD"):
            options = tuple(sorted(options))
        options = tuple(map(without_letter, options))
    if len(options) != NUM_CHOICES:
        raise question.wrong("options", f"{NUM_CHOICES} texts")
    return tuple(option.strip() for option in options)


def _mended(options: tuple[str, ...]) -> tuple[str, ...]:
    whole: list[str] = []
    for option in options:
        if printed_letter(option):
            whole.append(option)
        else:
            whole[-1] = f"{whole[-1]} {option}".strip()
    return tuple(whole)


def _read(
    path: Path, data_root: Path | None, questions_of: Callable[[Asked], list[Question]]
) -> list[Item]:
    items = ItemList(data_root)
    for asked in walk(load(path), str(path)):
        task = asked.question.optional(asked.question.text, "task_type")
        for question in questions_of(asked):
            items.add(
                asked.video_id,
                asked.entry.text("video_path"),
                question,
                task=task,
                where=asked.question.where,
            )
    return items.by_video()


def _choice_question(asked: Asked) -> Question:
    field = asked.question
    choices = options_of(field)
    # The letter, and nothing else: some options are letters themselves.
    place = place_of(field.text("answer"), [""] * NUM_CHOICES)
    if place is None:
        raise field.wrong("answer", "a letter from A to D")
    return Question(
        id=asked.id,
        text=field.text("question").strip(),
        time_s=field.time_s("time_stamp"),
        choices=choices,
        answer=choices[place],
    )


def _polls(asked: Asked) -> list[Question]:
    text = asked.question.text("question").strip()
    output = asked.question.text("ground_truth_output")
    poll = f'{text}{_POLL}"{output}" now? Answer with yes or no.'
    return [Question(name, poll, time_s=float(second)) for second, name in poll_ids(asked)]
