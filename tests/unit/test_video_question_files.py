import json
from pathlib import Path
from typing import Any

import pytest

from offload.errors import ConfigError
from offload.video.question_files import read_question_items, read_questions, typed_question
from offload.video.types import Question

FULL: dict[str, Any] = {
    "id": "cup",
    "t": "12:30",
    "question": "What is on the table?",
    "choices": ["A. a cup", "B. a book"],
    "answer": "B",
    "windows": [[740, 745.5]],
}
WHOLE = Question(
    id="cup",
    text="What is on the table?",
    time_s=750.0,
    choices=("a cup", "a book"),
    answer="a book",
    windows=((740.0, 745.5),),
)


def jsonl(folder: Path, *entries: dict[str, Any]) -> Path:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries))
    return path


def test_questions_of_jsonl_have_every_field(tmp_path: Path) -> None:
    assert read_questions(jsonl(tmp_path, FULL)) == (WHOLE,)


@pytest.mark.parametrize("data", [[FULL], {"questions": [FULL]}], ids=["list", "object"])
def test_questions_of_json_are_those_of_a_list_or_of_an_object(tmp_path: Path, data: Any) -> None:
    path = tmp_path / "questions.json"
    path.write_text(json.dumps(data), encoding="utf-8-sig")
    assert read_questions(path) == (WHOLE,)


def test_questions_of_a_text_file_are_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "questions.txt"
    path.write_text("What happened?\n\n@1:05 Which hand? | left | right\n")
    assert read_questions(path) == (
        Question("q2", "Which hand?", time_s=65.0, choices=("left", "right")),
        Question("q1", "What happened?"),
    )


def test_questions_without_an_id_get_one_by_their_place(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": "Late?", "t": 9}, {"question": "Early?", "t": 1.5})
    assert [(question.id, question.time_s) for question in read_questions(path)] == [
        ("q2", 1.5),
        ("q1", 9.0),
    ]


def test_question_with_a_line_separator_in_its_text_is_one_line(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": "One\u2028two?"})
    assert read_questions(path)[0].text == "One\u2028two?"


@pytest.mark.parametrize(
    ("answer", "text"), [("a cup", "a cup"), ("a", "a cup"), ("(B)", "a book"), (1, "a book")]
)
def test_answer_of_a_question_is_a_text_a_letter_or_a_place(
    tmp_path: Path, answer: str | int, text: str
) -> None:
    [question] = read_questions(jsonl(tmp_path, FULL | {"answer": answer}))
    assert question.answer == text


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"t": 1}, "line 2, field 'question': expected a text, found no such field"),
        ({"question": "?", "t": "1:xx"}, "line 2, field 't': expected a time"),
        ({"question": "?", "choices": ["x", "y"], "answer": "z"}, "line 2, field 'answer'"),
        ({"question": "?", "windows": [[2, 1]]}, "line 2, field 'windows'"),
        ({"question": "?", "id": "cup"}, "line 2: the id 'cup' is that of an earlier question"),
    ],
)
def test_question_with_a_wrong_field_is_refused_by_file_line_and_field(
    tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=rf"questions\.jsonl.*{message}"):
        read_questions(jsonl(tmp_path, FULL, entry))


def test_line_that_is_no_json_is_refused_by_its_number(tmp_path: Path) -> None:
    path = jsonl(tmp_path, FULL)
    path.write_text(path.read_text() + "\nwhat?\n")
    with pytest.raises(ConfigError, match=r"questions\.jsonl, line 3 is not JSON"):
        read_questions(path)


def test_question_items_of_one_video_come_together(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path,
        FULL | {"video": "a.mp4", "task": "objects"},
        FULL | {"video": "b.mp4", "id": "other"},
        FULL | {"video": "a.mp4", "id": "first", "t": 3},
    )
    first, second = read_question_items(path, tmp_path)
    assert [question.id for question in first.questions] == ["first", "cup"]
    assert first.tasks == {"cup": "objects"}
    assert first.video_path == tmp_path / "a.mp4"
    assert second.video_id == "b.mp4"


@pytest.mark.parametrize("missing", ["id", "video"])
def test_question_item_without_id_or_video_is_refused(tmp_path: Path, missing: str) -> None:
    entry = {name: value for name, value in (FULL | {"video": "a"}).items() if name != missing}
    with pytest.raises(ConfigError, match=f"line 1, field '{missing}'"):
        read_question_items(jsonl(tmp_path, entry))


@pytest.mark.parametrize(
    ("line", "question"),
    [
        ("what is it?", Question("q", "what is it?", time_s=7.0)),
        ("  what is it?\n", Question("q", "what is it?", time_s=7.0)),
        ("/at 12:30 what was it?", Question("q", "what was it?", time_s=750.0)),
        ("@90.5 what was it?", Question("q", "what was it?", time_s=90.5)),
        ("meet me @noon?", Question("q", "meet me @noon?", time_s=7.0)),
        ("which? | left | right", Question("q", "which?", 7.0, ("left", "right"))),
        ("a|b or c|d?", Question("q", "a|b or c|d?", time_s=7.0)),
    ],
)
def test_typed_line_becomes_a_question(line: str, question: Question) -> None:
    assert typed_question(line, "q", now_s=7.0) == question


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no question in it"),
        ("/at 12:30", "no question in it"),
        ("@12:30 ", "no question in it"),
        ("/quit", "no question in it"),
        ("/at noon what?", "'noon' is no time"),
        ("which? | left", "two choices or more"),
        ("which? | left |  | right", "none of them empty"),
    ],
)
def test_typed_line_without_a_question_is_refused(line: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        typed_question(line, "q")
