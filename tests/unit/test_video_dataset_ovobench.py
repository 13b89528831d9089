"""Entries in the shapes of ``ovo_bench_new.json``; every word in them is made up."""

import json
from pathlib import Path
from typing import Any

import pytest

from offload.errors import ConfigError
from offload.video.dataset_ovobench import read_ovobench

EPM: dict[str, Any] = {
    "id": 0,
    "task": "EPM",
    "video": "Ego4D/clips/one.mp4",
    "realtime": 215,
    "question": "Who was there?",
    "answer": "a person in a blue shirt",
    "options": ["brown shirt", "green shirt", "blue shirt"],
    "gt": 2,
}
OCR: dict[str, Any] = EPM | {"id": 7, "task": "OCR", "realtime": 26.48, "gt": 0}
REC: dict[str, Any] = {
    "id": 1558,
    "task": "REC",
    "video": "perception_test/two.mp4",
    "activity": "jump",
    "start_times": [6],
    "end_times": [17],
    "test_info": [{"realtime": 17, "count": 0}, {"realtime": 32.5, "count": 1}],
}
SSR: dict[str, Any] = {
    "id": 1516,
    "task": "SSR",
    "video": "COIN/three.mp4",
    "tutorial": "BakeBread",
    "all_steps": ["mix", "bake"],
    "start_time": [25, 31],
    "end_time": [30, 49],
    "test_info": [
        {"realtime": 27, "step": "mix", "type": 1},
        {"realtime": 26, "step": "bake", "type": 0},
    ],
}
CRR: dict[str, Any] = {
    "id": 1468,
    "task": "CRR",
    "video": "MovieNet/four.mp4",
    "question": "What does she do then?",
    "answer": "She walks past.",
    "ask_time": 297,
    "clue_time": 308,
    "test_info": [{"realtime": 297, "type": 0}, {"realtime": 310, "type": 1}],
}


def annotations(folder: Path, *entries: dict[str, Any]) -> Path:
    path = folder / "ovo.json"
    path.write_text(json.dumps(entries))
    return path


def test_ovobench_questions_about_one_video_are_one_item_sorted_by_time(tmp_path: Path) -> None:
    [item] = read_ovobench(annotations(tmp_path, EPM, OCR))
    assert item.video_id == "Ego4D/clips/one"
    assert [(question.id, question.time_s) for question in item.questions] == [
        ("7", 26.48),
        ("0", 215.0),
    ]
    assert item.tasks == {"0": "EPM", "7": "OCR"}


def test_ovobench_right_option_is_that_at_gt_however_the_answer_words_it(tmp_path: Path) -> None:
    [item] = read_ovobench(annotations(tmp_path, EPM))
    assert item.questions[0].answer == "blue shirt"


@pytest.mark.parametrize(
    ("entry", "asked"),
    [
        (REC, [("1558_0", 17.0, "0"), ("1558_1", 32.5, "1")]),
        (SSR, [("1516_1", 26.0, "No"), ("1516_0", 27.0, "Yes")]),
        (CRR, [("1468_0", 297.0, "No"), ("1468_1", 310.0, "Yes")]),
    ],
    ids=["REC", "SSR", "CRR"],
)
def test_ovobench_forward_task_asks_at_every_time_of_its_test_info(
    tmp_path: Path, entry: dict[str, Any], asked: list[tuple[str, float, str]]
) -> None:
    [item] = read_ovobench(annotations(tmp_path, entry))
    assert [(question.id, question.time_s, question.answer) for question in item.questions] == asked
    assert set(item.tasks.values()) == {entry["task"]}


@pytest.mark.parametrize(
    ("entry", "words"), [(REC, "jump"), (SSR, "bake"), (CRR, "What does she do then?")]
)
def test_ovobench_forward_question_says_what_it_is_about(
    tmp_path: Path, entry: dict[str, Any], words: str
) -> None:
    [item] = read_ovobench(annotations(tmp_path, entry))
    assert any(words in question.text for question in item.questions)
    assert all(question.choices == () for question in item.questions)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (EPM | {"task": "XYZ"}, "field 'task': expected one of EPM, .* found \"XYZ\""),
        (EPM | {"gt": 3}, "field 'gt': expected a place among the 3 options, from 0, found 3"),
        (EPM | {"gt": "C"}, "field 'gt': expected a whole number"),
        (EPM | {"id": "0"}, "field 'id': expected a whole number"),
        (EPM | {"realtime": None}, "field 'realtime': expected a number"),
        (REC | {"test_info": [{"realtime": 1}]}, "test_info 0, field 'count': .*no such field"),
        (SSR | {"test_info": [{"realtime": 1, "step": "mix", "type": 2}]}, "field 'type': .*found"),
        (CRR | {"test_info": 5}, "field 'test_info': expected a list of objects"),
    ],
)
def test_ovobench_entry_with_a_wrong_field_is_refused_by_file_entry_and_field(
    tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"ovo\.json: entry 0.*{message}"):
        read_ovobench(annotations(tmp_path, entry))


def test_ovobench_id_that_comes_twice_is_refused_at_the_second(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="entry 1: the id '0' is that of an earlier question"):
        read_ovobench(annotations(tmp_path, EPM, EPM | {"video": "other.mp4"}))
