import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from offload.errors import ClosedError, ConfigError, DiskFull
from offload.video.answer_files import AnswerFile, answers_by_id, read_answers
from offload.video.answer_records import Record, to_line
from offload.video.types import Answer, Evidence, Question

QUESTION = Question(
    id="v/0",
    text="Wo ist die Tasse – 在哪里?\u2028",
    time_s=705.5,
    choices=("on the shelf", "in the sink"),
    answer="in the sink",
    windows=((700.0, 705.0),),
)
ANSWER = Answer(
    question=QUESTION,
    text="(B) in the sink",
    evidence=(Evidence(705.0, 352, 0.5, 9), Evidence(12.0, 6, -0.25, 1)),
    num_frames=353,
    timings_ms={"select": 1.5, "load": 2.0, "first_token": 9.0, "total": 20.25, "decode": 3.0},
    bytes_from={"gpu": 0, "cpu": 4096, "disk": 8192},
    about={"model": "badge", "coverage": 0.75, "preset": "tokmax", "topk": 4},
)

LINE_BYTES = len(to_line(Record(ANSWER)))

KILLED = """
import os, signal, sys
from pathlib import Path
from offload.video.answer_files import AnswerFile
from offload.video.types import Answer, Question
with AnswerFile(Path(sys.argv[1])) as file:
    for number in range(3):
        file.append(Answer(Question(str(number), "?"), "yes"))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def answer(name: str, text: str = "yes") -> Answer:
    return Answer(Question(name, "Is it?"), text)


def write(path: Path, *answers: Answer) -> bytes:
    with AnswerFile(path) as file:
        for each in answers:
            file.append(each)
    return path.read_bytes()


def test_answer_that_was_appended_is_read_back_whole(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path) as file:
        file.append(ANSWER, video_id="v", task="where")
        file.append(answer("v/1"))
    assert read_answers(path) == [Record(ANSWER, "v", "where"), Record(answer("v/1"))]


def test_line_of_an_answer_has_the_fields_of_the_schema(tmp_path: Path) -> None:
    [line] = write(tmp_path / "answers.jsonl", ANSWER).decode().rstrip("\n").split("\n")
    assert json.loads(line) == {
        "id": "v/0",
        "video": None,
        "task": None,
        "t": 705.5,
        "question": QUESTION.text,
        "choices": ["on the shelf", "in the sink"],
        "expected": "in the sink",
        "windows": [[700.0, 705.0]],
        "answer": "(B) in the sink",
        "choice": "B",
        "correct": True,
        "evidence": [
            {"t": 705.0, "frame": 352, "score": 0.5, "layers": 9},
            {"t": 12.0, "frame": 6, "score": -0.25, "layers": 1},
        ],
        "frames_seen": 353,
        "retrieval_ms": 1.5,
        "load_ms": 2.0,
        "model_ms": None,
        "ttft_ms": 9.0,
        "total_ms": 20.25,
        "other_ms": {"decode": 3.0},
        "bytes_from": {"gpu": 0, "cpu": 4096, "disk": 8192},
        "model": "badge",
        "coverage": 0.75,
        "settings": {"preset": "tokmax", "topk": 4},
    }


def test_numbers_of_numpy_and_other_objects_are_written_as_plain_ones(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    given = Answer(
        QUESTION,
        "B",
        evidence=(Evidence(np.float32(2.0), np.int64(1), np.float32(0.5), 1),),  # type: ignore[arg-type]
        about={"folder": Path("models"), "fps": np.float64(0.5)},
    )
    write(path, given)
    [record] = read_answers(path)
    assert record.answer.evidence == (Evidence(2.0, 1, 0.5, 1),)
    assert record.answer.about == {"folder": "models", "fps": 0.5}


def test_text_that_is_no_unicode_survives(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, answer("a", "half \ud83d and\nmore"))
    assert read_answers(path)[0].answer.text == "half \ud83d and\nmore"


def test_score_that_is_no_number_is_refused_and_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path) as file:
        file.append(answer("a"))
        size = path.stat().st_size
        with pytest.raises(ValueError, match="not JSON compliant"):
            file.append(Answer(QUESTION, "B", evidence=(Evidence(1.0, 1, float("nan"), 1),)))
        assert path.stat().st_size == size
        assert file.done == {"a"}


def test_file_that_is_opened_again_knows_what_is_done_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, answer("a"), answer("b"))
    with AnswerFile(path) as file:
        assert file.done == {"a", "b"}
        file.append(answer("c"))
        assert file.done == {"a", "b", "c"}
    assert [record.answer.question.id for record in read_answers(path)] == ["a", "b", "c"]


@pytest.mark.parametrize("cut", [1, 5, 12, 21, 22, 300, LINE_BYTES - 2, LINE_BYTES - 1])
def test_last_line_torn_anywhere_is_dropped_and_written_anew(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "answers.jsonl"
    first, second = to_line(Record(answer("a"))), to_line(Record(ANSWER))
    path.write_bytes(first + second[:cut])
    is_whole = cut == len(second) - 1  # only its newline is missing
    expected = {"a", "v/0"} if is_whole else {"a"}
    assert {record.answer.question.id for record in read_answers(path)} == expected
    with AnswerFile(path, sync=False) as file:
        assert file.done == expected
    assert path.read_bytes() == (first + second if is_whole else first)


@pytest.mark.parametrize("torn", [b"\0\0\0", b'{"id": "x\0\0', '{"id": "ü'.encode()[:-1]])
def test_last_line_of_zeros_or_half_a_letter_is_dropped(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    whole = write(path, answer("a"))
    path.write_bytes(whole + torn)
    with AnswerFile(path) as file:
        assert file.done == {"a"}
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"my notes", "is no file of answers: it ends with b'my notes'"),
        (b"my notes\n", "line 1 is not JSON"),
        (b"[1, 2]\n", "line 1: expected an object"),
        (b'{"id": "x"}\n', "line 1, field 'question'"),
        (b"17", "line 1: expected an object"),
        (b"\xff\xff\n", "is not UTF-8"),
    ],
)
def test_file_of_something_else_is_refused_and_left_as_it_is(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        AnswerFile(path)
    with pytest.raises(ConfigError, match=message):
        read_answers(path)
    assert path.read_bytes() == content


def test_broken_line_in_the_middle_is_refused_by_its_number(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    first, second = to_line(Record(answer("a"))), to_line(Record(answer("b")))
    path.write_bytes(first + second[:20] + b"\n" + second)
    with pytest.raises(ConfigError, match=r"answers\.jsonl, line 2 is not JSON"):
        read_answers(path)


@pytest.mark.leaks
def test_second_writer_of_a_file_is_refused_while_the_first_has_it(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    with AnswerFile(path) as first:
        with pytest.raises(ConfigError, match="another process is writing answers to"):
            AnswerFile(path)
        first.append(answer("a"))
    with AnswerFile(path) as second:
        assert second.done == {"a"}


@pytest.mark.leaks
def test_append_to_a_file_at_its_limit_raises_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with AnswerFile(path) as file:
        file.append(answer("a"))
        before = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, hard))
        try:
            with pytest.raises(DiskFull, match=r"write of \d+ bytes to .*answers\.jsonl"):
                file.append(answer("b"))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == before
        assert file.done == {"a"}
        file.append(answer("b"))
    assert [record.answer.question.id for record in read_answers(path)] == ["a", "b"]


def test_answers_of_a_process_that_was_killed_are_all_there(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    process = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert process.returncode == -signal.SIGKILL
    with AnswerFile(path) as file:
        assert file.done == {"0", "1", "2"}


def test_append_after_close_is_refused(tmp_path: Path) -> None:
    file = AnswerFile(tmp_path / "answers.jsonl")
    file.close()
    file.close()
    with pytest.raises(ClosedError, match="was closed before the answer to 'a'"):
        file.append(answer("a"))


def test_folder_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be written to .*: No such file"):
        AnswerFile(tmp_path / "nowhere" / "answers.jsonl")
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_answers(tmp_path / "answers.jsonl")


def test_last_of_several_answers_to_a_question_is_the_one_that_counts(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    write(path, answer("a", "no"), answer("b"), answer("a", "yes"))
    records = read_answers(path)
    assert len(records) == 3
    assert answers_by_id(records) == {"a": answer("a", "yes"), "b": answer("b")}
