"""Entries in the shapes of ``data/*/*.json`` of ReKV; every word in them is made up."""

import json
from pathlib import Path
from typing import Any

import pytest

from offload.errors import ConfigError
from offload.video.dataset_rekv import read_rekv

RVS = {
    "video_id": "ego_1",
    "video_path": "data/rvs/ego/videos/ego_1.mp4",
    "duration": 3600.0,
    "conversations": [
        {"question": "Second?", "answer": "A cup.", "start_time": 300, "end_time": 600},
        {"question": "First?", "answer": "A book.", "start_time": 0, "end_time": 300},
        {"question": "Third?", "answer": "A pen.", "start_time": 300, "end_time": 600},
    ],
}
PAN = {
    "question": "Where is the pan?",
    "choices": ["on the stove", "in the sink", "on the floor", "in a box"],
    "answer": "in the sink",
    "temporal_windows": [[4, 6], [10.5, 12]],
}
QAEGO4D = {
    "video_id": "kitchen",
    "video_path": "data/qaego4d/videos/kitchen.mp4",
    "duration": 480,
    "conversations": [PAN],
}
MLVU = {
    "video_id": "film_3",
    "video_path": "data/mlvu/videos/1_plotQA/film_3.mp4",
    "duration": 740,
    "conversations": [
        {
            "question": "Which colour?",
            "choices": ["Red", "Blue", "", "Red"],
            "answer": "Red",
            "question_type": "plotQA",
        }
    ],
}
MLVU_OTHER_TASK = {
    "video_id": "film_3",
    "video_path": "data/mlvu/videos/7_topic_reasoning/film_3.mp4",
    "duration": 740,
    "conversations": [
        {
            "question": "What kind?",
            "choices": ["A. comedy", "B. drama"],
            "answer": "B",
            "question_type": "topic_reasoning",
        }
    ],
}
ACTIVITYNET = {
    "video_id": "v_x",
    "video_path": "data/activitynet_qa/videos/v_x.mp4",
    "duration": 9.88,
    "conversations": [{"question": "Is it wet?", "answer": "no", "question_type": 3}],
}
EGOSCHEMA = {
    "video_id": "0a1b",
    "video_path": "data/egoschema/videos/0a1b.mp4",
    "duration": 180.0,
    "conversations": [{"question": "Why?", "choices": ["a", "b", "c", "d", "e"], "answer": None}],
}


def annotations(folder: Path, *entries: Any) -> Path:
    path = folder / "annotations.json"
    path.write_text(json.dumps(list(entries)))
    return path


def test_rekv_questions_with_end_times_are_asked_then_and_in_that_order(tmp_path: Path) -> None:
    [item] = read_rekv(annotations(tmp_path, RVS))
    asked = [(question.id, question.text, question.time_s) for question in item.questions]
    assert asked == [
        ("ego_1/1", "First?", 300.0),
        ("ego_1/0", "Second?", 600.0),
        ("ego_1/2", "Third?", 600.0),
    ]
    assert (item.duration_s, item.tasks) == (3600.0, {})


def test_rekv_question_with_windows_has_them_and_is_asked_at_the_end(tmp_path: Path) -> None:
    [item] = read_rekv(annotations(tmp_path, QAEGO4D))
    [question] = item.questions
    assert question.windows == ((4.0, 6.0), (10.5, 12.0))
    assert question.time_s is None
    assert question.answer == "in the sink"
    assert question.choices[1] == "in the sink"


def test_rekv_entries_of_one_video_are_one_item_with_the_tasks_of_both(tmp_path: Path) -> None:
    [item] = read_rekv(annotations(tmp_path, MLVU, MLVU_OTHER_TASK))
    assert [question.id for question in item.questions] == ["film_3/0", "film_3/1"]
    assert item.tasks == {"film_3/0": "plotQA", "film_3/1": "topic_reasoning"}
    assert item.video_path == Path("data/mlvu/videos/1_plotQA/film_3.mp4")


def test_rekv_choices_keep_their_places_and_lose_their_letters(tmp_path: Path) -> None:
    [item] = read_rekv(annotations(tmp_path, MLVU, MLVU_OTHER_TASK))
    assert item.questions[0].choices == ("Red", "Blue", "", "Red")
    assert item.questions[1].choices == ("comedy", "drama")
    assert item.questions[1].answer == "drama"


def test_rekv_question_type_that_is_a_number_is_a_task(tmp_path: Path) -> None:
    [item] = read_rekv(annotations(tmp_path, ACTIVITYNET))
    assert item.tasks == {"v_x/0": "3"}
    assert item.questions[0].choices == ()
    assert item.questions[0].answer == "no"


def test_rekv_question_whose_answer_is_kept_back_has_none(tmp_path: Path) -> None:
    [item] = read_rekv(annotations(tmp_path, EGOSCHEMA))
    assert item.questions[0].answer is None
    assert len(item.questions[0].choices) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": ""}, r"entry 0, conversations 0, field 'question': expected a text, found"),
        ({"question": 7}, r"field 'question': expected a text, found 7"),
        ({"answer": "on the roof"}, r"field 'answer': expected one of the 4 choices.*on the roof"),
        ({"answer": 4}, r"field 'answer': expected one of the 4 choices.*found 4"),
        ({"answer": 0.5}, r"field 'answer': expected a text, found 0.5"),
        ({"choices": "none"}, r"field 'choices': expected a list of texts"),
        ({"choices": ["x", 3]}, r"field 'choices': expected a list of texts"),
        ({"end_time": -1}, r"field 'end_time': expected a number that is not negative, found -1"),
        ({"end_time": True}, r"field 'end_time': expected a number"),
        ({"end_time": float("nan")}, r"field 'end_time': expected a number.*NaN"),
        ({"temporal_windows": [[6, 4]]}, r"field 'temporal_windows': expected a list of pairs"),
        ({"temporal_windows": [4, 6]}, r"field 'temporal_windows': expected a list of pairs"),
    ],
)
def test_rekv_question_with_a_wrong_field_is_refused_by_file_entry_and_field(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = annotations(tmp_path, QAEGO4D | {"conversations": [PAN | change]})
    with pytest.raises(ConfigError, match=rf"annotations\.json.*{message}"):
        read_rekv(path)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({}, "entry 0, field 'video_id': expected a text, found no such field"),
        ({"video_id": "x", "video_path": "x", "conversations": {}}, "field 'conversations'"),
        ({"video_id": "x", "video_path": "x", "conversations": [1]}, "conversations 0: expected"),
        (RVS | {"duration": "long"}, "field 'duration': expected a number"),
        ("text", 'entry 0: expected an object, found "text"'),
    ],
)
def test_rekv_entry_of_another_shape_is_refused_by_its_place(
    tmp_path: Path, entry: object, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_rekv(annotations(tmp_path, entry))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"videos": []}', "expected a list of objects, found"),
        (b'[{"video_id": ', r"is not JSON: .* at line 1, column 15"),
        (b"\xff\xfe", "is not UTF-8: byte 0"),
    ],
)
def test_rekv_file_that_is_no_list_is_refused_by_its_name(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"broken\.json.*{message}"):
        read_rekv(path)


def test_rekv_file_that_is_missing_is_refused_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json cannot be read: No such file"):
        read_rekv(tmp_path / "nowhere.json")
