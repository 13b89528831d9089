"""Result files of StreamingBench and OVO-Bench: their questions with responses in them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from offload.video import dataset_ovobench as ovobench
from offload.video import dataset_streamingbench as streamingbench
from offload.video.choices import letter_of, parse_count, parse_yes_no, plain_choices
from offload.video.dataset_fields import Fields, read_objects
from offload.video.results import NO_LETTER, Result, chosen_letter
from offload.video.types import Answer


def streamingbench_json(annotations: Path, answers: Mapping[str, Answer], model: str) -> Result:
    """Return the questions of StreamingBench with a letter under the model's name in each.

    For ``count.py --task real``, ``omni`` or ``sqa``, which passes over questions without one.
    """
    data = streamingbench.load(annotations)
    answered, missing = 0, []
    for asked in streamingbench.walk(data, str(annotations)):
        if asked.id not in answers:
            missing.append(asked.id)
            continue
        choices = streamingbench.options_of(asked.question)
        asked.question.values[model] = chosen_letter(answers[asked.id].text, choices) or NO_LETTER
        answered += 1
    return Result(_json(data), answered, tuple(missing))


def proactive_json(annotations: Path, answers: Mapping[str, Answer], model: str) -> Result:
    """Return the proactive questions of StreamingBench with the dialogue under the model's name.

    Polls up to the first yes, then the output. For ``count.py --task proactive``. A question counts
    as answered if its polls were answered up to the first yes, or to the last.
    """
    data = streamingbench.load(annotations)
    answered, missing = 0, []
    for asked in streamingbench.walk(data, str(annotations)):
        dialogue = _dialogue(streamingbench.poll_ids(asked), answers)
        if dialogue is None:
            missing.append(asked.id)
            continue
        asked.question.values[model] = dialogue
        answered += 1
    return Result(_json(data), answered, tuple(missing))


def ovobench_json(annotations: Path, answers: Mapping[str, Answer], model: str) -> Result:
    """Return results of OVO-Bench, for its ``score.py``: ``backward``, ``realtime``, ``forward``.

    A reply that names no option becomes null, which counts as wrong.
    """
    parts: dict[str, list[Any]] = {"backward": [], "realtime": [], "forward": []}
    answered, missing = 0, []
    for entry in read_objects(annotations):
        kind = ovobench.kind_of(entry)
        ids = ovobench.question_ids(entry)
        there = [name for name in ids if name in answers]
        answered += len(there)
        missing += [name for name in ids if name not in answers]
        if there and kind == "forward":
            parts[kind].append(_forward(entry, answers))
        elif there:
            parts[kind].append(_backward(entry, answers[ids[0]]))
    return Result(_json(parts), answered, tuple(missing))


def _dialogue(polls: list[tuple[int, str]], answers: Mapping[str, Answer]) -> dict[str, Any] | None:
    turns: list[dict[str, Any]] = []
    for second, poll_id in polls:
        if poll_id not in answers:
            return None
        turns += _turns(answers[poll_id], second)
        if parse_yes_no(answers[poll_id].text):
            output = answers.get(streamingbench.output_id(poll_id))
            turns += _turns(output, second) if output is not None else []
            return {"answered": second, "dialog_history": turns}
    return {"answered": False, "dialog_history": turns} if turns else None


def _turns(answer: Answer, second: int) -> list[dict[str, Any]]:
    facts = {"time": second, "cost": answer.timings_ms.get("total", 0.0) / 1000}
    return [
        {"role": "user", "content": answer.question.text} | facts,
        {"role": "assistant", "content": answer.text} | facts,
    ]


def _backward(entry: Fields, answer: Answer) -> dict[str, Any]:
    response = chosen_letter(answer.text, plain_choices(entry.texts("options")))
    kept = {name: entry.values[name] for name in ("id", "video", "task", "question")}
    return kept | {"response": response, "ground_truth": letter_of(entry.integer("gt"))}


def _forward(entry: Fields, answers: Mapping[str, Answer]) -> dict[str, Any]:
    said = _count if entry.text("task") == "REC" else _yes_no
    queries = zip(ovobench.question_ids(entry), entry.objects("test_info"), strict=True)
    info = [
        query.values | {"response": said(answers[name].text)}
        for name, query in queries
        if name in answers
    ]
    return entry.values | {"test_info": info}


def _count(reply: str) -> str | None:
    count = parse_count(reply)
    return None if count is None else str(count)


def _yes_no(reply: str) -> str | None:
    is_yes = parse_yes_no(reply)
    return None if is_yes is None else ("Yes" if is_yes else "No")


def _json(data: object) -> str:
    return json.dumps(data, indent=4) + "\n"
