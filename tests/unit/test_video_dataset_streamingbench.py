"""Entries in the shapes of ``questions_*.json`` of StreamingBench; every word is made up."""

import json
from pathlib import Path
from typing import Any

import pytest

from offload.errors import ConfigError
from offload.video.dataset_items import Item
from offload.video.dataset_streamingbench import (
    follow_up,
    options_of,
    read_proactive,
    read_real,
    read_sqa,
    walk,
)
from offload.video.types import Question

OPTIONS = ["A. A compass.", "B. A map.", "C. A clock.", "D. A lamp."]


def choice(time_stamp: str, answer: str = "B", **fields: Any) -> dict[str, Any]:
    return {
        "task_type": "Object Recognition",
        "question": f"What is there at {time_stamp}?",
        "time_stamp": time_stamp,
        "answer": answer,
        "options": OPTIONS,
        "required_ability": "working memory",
    } | fields


def entry(number: int, *questions: dict[str, Any], kind: str = "real") -> dict[str, Any]:
    return {
        "time": "[0:00:00 - 0:00:10]",
        "questions": list(questions),
        "video_categories": "cockpits",
        "video_path": f"./videos/sample_{number}_{kind}.mp4",
    }


def proactive(time_stamp: str, ground_truth: str) -> dict[str, Any]:
    return {
        "task_type": "Proactive Output",
        "question": 'When the score is 3, output "3".',
        "time_stamp": time_stamp,
        "ground_truth_time_stamp": ground_truth,
        "ground_truth_output": "3",
        "required_ability": "working memory",
    }


def write(folder: Path, data: object) -> Path:
    path = folder / "questions.json"
    path.write_text(json.dumps(data))
    return path


def times(item: Item) -> list[tuple[str, float | None]]:
    return [(question.id, question.time_s) for question in item.questions]


def test_real_clips_of_one_video_become_one_item_sorted_by_time(tmp_path: Path) -> None:
    clips = [
        entry(1, choice("00:01:31")),
        entry(2, choice("0:00:05")),
        entry(1, choice("00:00:31"), choice("00:01:31", "C")),
    ]
    first, second = read_real(write(tmp_path, clips))
    assert first.video_id == "sample_1_real"
    assert times(first) == [
        ("sample_1_real/1", 31.0),
        ("sample_1_real/0", 91.0),
        ("sample_1_real/2", 91.0),
    ]
    assert times(second) == [("sample_2_real/0", 5.0)]
    assert set(first.tasks.values()) == {"Object Recognition"}


def test_real_answer_is_the_text_of_the_option_with_its_letter(tmp_path: Path) -> None:
    [item] = read_real(write(tmp_path, [entry(1, choice("00:00:31", "C"))]))
    assert item.questions[0].choices == ("A compass.", "A map.", "A clock.", "A lamp.")
    assert item.questions[0].answer == "A clock."


def test_stream_file_with_all_questions_of_a_video_reads_like_its_clips(tmp_path: Path) -> None:
    asked = [choice("00:00:31"), choice("00:01:31")]
    stream = {"questions": asked, "video_path": "./videos/sample_1_real.mp4"}
    clips = [entry(1, question) for question in asked]
    assert read_real(write(tmp_path, [stream])) == read_real(write(tmp_path, clips))


@pytest.mark.parametrize(
    ("time_stamp", "time_s"),
    [("00:00:8", 8.0), ("00:24", 24.0), ("0:24:00", 1440.0), ("00:12450", 12450.0)],
)
def test_time_stamps_of_every_shape_in_the_files_are_read(
    tmp_path: Path, time_stamp: str, time_s: float
) -> None:
    [item] = read_real(write(tmp_path, [entry(1, choice(time_stamp))]))
    assert item.questions[0].time_s == time_s


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        (["2.", "6.", "7.", "4."], ("2.", "6.", "7.", "4.")),
        (["A. a", "B. b", "", "C. c", "", "D. d"], ("a", "b", "c", "d")),
        (["A. a", "B. b that", "goes on", "C. c", "D. d"], ("a", "b that goes on", "c", "d")),
        (["A. a", "C. c", "B. b", "D. d"], ("a", "b", "c", "d")),
        (["A. a", "B. b", "B. c", "D. d"], ("a", "b", "c", "d")),
        (["A. a", "B. b", "C. c", "D. d", "E. .", "F. Translated"], ("a", "b", "c", "d")),
        (["A. a", "B. b", "C. c", "D. d", "D. d"], ("a", "b", "c", "d")),
        (["A.Lebrun.", "Fan Z.D.", "Xu.", "Ma."], ("A.Lebrun.", "Fan Z.D.", "Xu.", "Ma.")),
    ],
)
def test_options_of_every_shape_in_the_files_become_four(
    options: list[str], plain: tuple[str, ...]
) -> None:
    [asked] = walk([entry(1, choice("0:00:05", options=options))], "file")
    assert options_of(asked.question) == plain


def test_sequential_question_tells_the_earlier_ones_and_their_answers(tmp_path: Path) -> None:
    groups = [
        [
            entry(1, choice("00:00:36", "A"), kind="sqa"),
            entry(1, choice("00:03:02", "D"), kind="sqa"),
        ],
        [entry(2, choice("00:00:10"), kind="sqa")],
    ]
    first, second = read_sqa(write(tmp_path, groups))
    assert first.questions[0].text == "What is there at 00:00:36?"
    assert first.questions[1].text == (
        "Asked and answered earlier:\n"
        "At 00:00:36: What is there at 00:00:36? Answer: A compass.\n"
        "Now answer this: What is there at 00:03:02?"
    )
    assert second.questions[0].text == "What is there at 00:00:10?"


def test_proactive_question_is_polled_every_second_until_four_past_its_moment(
    tmp_path: Path,
) -> None:
    asked = proactive("00:00:20", "00:00:22")
    [item] = read_proactive(write(tmp_path, [entry(1, asked, kind="proactive")]))
    assert times(item) == [
        (f"sample_1_proactive/0@{second}", float(second)) for second in range(21, 27)
    ]
    assert all(item.tasks[question.id] == "Proactive Output" for question in item.questions)


def test_proactive_poll_with_a_yes_is_followed_by_the_question_itself(tmp_path: Path) -> None:
    asked = proactive("00:00:20", "00:00:22")
    [item] = read_proactive(write(tmp_path, [entry(1, asked, kind="proactive")]))
    poll = item.questions[0]
    following = follow_up(poll, "Yes, it is.")
    assert following is not None
    assert following == Question(
        "sample_1_proactive/0@21/output", 'When the score is 3, output "3".', time_s=21.0
    )
    assert follow_up(following, "Yes") is None


def test_proactive_poll_without_a_yes_is_followed_by_nothing(tmp_path: Path) -> None:
    asked = proactive("00:00:20", "00:00:22")
    [item] = read_proactive(write(tmp_path, [entry(1, asked, kind="proactive")]))
    assert [follow_up(item.questions[0], reply) for reply in ("No.", "", "3")] == [None] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": "E"}, "field 'answer': expected a letter from A to D, found \"E\""),
        ({"answer": "A map."}, "field 'answer': expected a letter from A to D"),
        ({"options": OPTIONS[:3]}, "field 'options': expected 4 texts"),
        ({"options": None}, "field 'options': expected a list of texts"),
        ({"time_stamp": "soon"}, "field 'time_stamp': expected a time such as"),
        ({"time_stamp": "1:2:3:4"}, "field 'time_stamp': expected a time such as"),
        ({"time_stamp": "-0:05"}, "field 'time_stamp': expected a time such as"),
        ({"question": None}, "field 'question': expected a text"),
    ],
)
def test_real_question_with_a_wrong_field_is_refused_by_file_entry_and_field(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, [entry(1, choice("0:00:01")), entry(1, choice("0:00:02") | change)])
    with pytest.raises(ConfigError, match=rf"questions\.json: entry 1, questions 0, {message}"):
        read_real(path)


def test_sequential_group_with_a_wrong_field_is_refused_by_group_and_entry(tmp_path: Path) -> None:
    groups = [[entry(1, choice("0:00:01"))], [entry(2, choice("0:00:02", answer="no"))]]
    with pytest.raises(ConfigError, match="group 1: entry 0, questions 0, field 'answer'"):
        read_sqa(write(tmp_path, groups))
