"""Result files are read here the way the official scorers read them; every word is made up."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from offload.errors import ConfigError
from offload.video.datasets import dataset
from offload.video.results import Result, write_result
from offload.video.types import Answer, Evidence, Question

OPTIONS = ["A. a compass", "B. a map", "C. a clock", "D. a lamp"]


def answers(replies: dict[str, str], evidence: Sequence[Evidence] = ()) -> dict[str, Answer]:
    return {
        name: Answer(Question(name, "asked?"), text, tuple(evidence), timings_ms={"total": 1500.0})
        for name, text in replies.items()
    }


def convert(folder: Path, name: str, data: object, given: dict[str, Answer]) -> Result:
    path = folder / "annotations.json"
    path.write_text(json.dumps(data))
    converter = dataset(name).convert
    assert converter is not None
    return converter(path, given, "Ours")


def rows(result: Result) -> list[dict[str, str]]:
    return list(csv.DictReader(result.text.splitlines()))


def conversation(video_id: str, *asked: dict[str, Any]) -> dict[str, Any]:
    return {
        "video_id": video_id,
        "video_path": f"videos/{video_id}.mp4",
        "duration": 60,
        "conversations": list(asked),
    }


PAN = {
    "question": "Where is the pan?",
    "choices": ["on the stove", "in the sink"],
    "answer": "in the sink",
}


def test_rekv_csv_of_choices_has_the_columns_its_scorer_reads(tmp_path: Path) -> None:
    data = [conversation("film", PAN | {"question_type": "plotQA"}, PAN, PAN)]
    given = answers({"film/0": "(B) in\nthe sink", "film/1": "A", "film/2": ""})
    result = convert(tmp_path, "mlvu", data, given)
    first, second, third = rows(result)
    assert first == {
        "video_id": "film",
        "question": "Where is the pan?",
        "choices": "['on the stove', 'in the sink']",
        "answer": "in the sink",
        "correct_choice": "B",
        "pred_answer": "B",
        "pred_choice": "B",
        "qa_acc": "100.0",
        "task": "plotQA",
        "retrieve_size": "64",
        "chunk_size": "1",
    }
    assert (second["pred_choice"], second["qa_acc"], second["task"]) == ("A", "0.0", "")
    assert (third["pred_answer"], third["pred_choice"], third["qa_acc"]) == ("?", "?", "0.0")


def test_rekv_csv_with_windows_has_percent_of_evidence_too(tmp_path: Path) -> None:
    data = [conversation("film", PAN | {"temporal_windows": [[4, 6]]})]
    given = answers({"film/0": "B"}, [Evidence(5.0, 5, 0.9, 1), Evidence(8.0, 8, 0.1, 1)])
    [row] = rows(convert(tmp_path, "qaego4d", data, given))
    scores = {name: row[name] for name in ("recall", "precision", "f1", "acc_at_gqa")}
    assert scores == {"recall": "50.0", "precision": "50.0", "f1": "50.0", "acc_at_gqa": "100.0"}


def test_rekv_csv_of_open_questions_has_reply_and_answer(tmp_path: Path) -> None:
    asked = {"question": "What is it?", "answer": "A cup.", "start_time": 0, "end_time": 30}
    result = convert(
        tmp_path, "rvs_ego", [conversation("ego", asked, asked)], answers({"ego/1": "A mug,\nblue"})
    )
    assert rows(result) == [
        {
            "video_id": "ego",
            "question": "What is it?",
            "answer": "A cup.",
            "pred_answer": "A mug, blue",
            "retrieve_size": "64",
            "chunk_size": "1",
        }
    ]
    assert (result.num_answered, result.missing) == (1, ("ego/0",))


def test_egoschema_submission_has_places_from_zero(tmp_path: Path) -> None:
    asked = {"question": "Why?", "choices": ["v", "w", "x", "y", "z"], "answer": None}
    data = [conversation(name, asked) for name in ("one", "two", "three")]
    result = convert(tmp_path, "egoschema", data, answers({"one/0": "(E", "two/0": "no idea"}))
    assert result.text == "q_uid,answer\none,4\ntwo,0\n"
    assert result.missing == ("three/0",)


def streaming(*questions: dict[str, Any]) -> dict[str, Any]:
    return {"time": "[0 - 1]", "questions": list(questions), "video_path": "./videos/sample_1.mp4"}


CHOICE = {
    "task_type": "Counting",
    "question": "What is it?",
    "time_stamp": "00:00:10",
    "answer": "B",
    "options": OPTIONS,
}


@pytest.mark.parametrize("nested", [False, True], ids=["real", "sqa"])
def test_streamingbench_json_has_a_letter_under_the_name_of_the_model(
    tmp_path: Path, nested: bool
) -> None:
    entries = [streaming(CHOICE), streaming(CHOICE, CHOICE), streaming(CHOICE)]
    data = [entries] if nested else entries
    given = answers({"sample_1/0": "(B) a map", "sample_1/1": "a clock", "sample_1/2": "A hat?"})
    name = "streamingbench_sqa" if nested else "streamingbench_real"
    result = convert(tmp_path, name, data, given)
    written = json.loads(result.text)
    said = [
        question for entry in (written[0] if nested else written) for question in entry["questions"]
    ]
    assert [question.get("Ours") for question in said] == ["B", "C", "?", None]
    assert said[3] == CHOICE
    assert (result.num_answered, result.missing) == (3, ("sample_1/3",))


PROACTIVE = {
    "task_type": "Proactive Output",
    "question": 'At 3 points, output "3".',
    "time_stamp": "00:00:20",
    "ground_truth_time_stamp": "00:00:21",
    "ground_truth_output": "3",
}
POLLS = {second: f"sample_1/0@{second}" for second in range(21, 26)}


def test_proactive_json_has_the_dialogue_up_to_the_first_yes(tmp_path: Path) -> None:
    replies = {POLLS[21]: "No.", POLLS[22]: "Yes", f"{POLLS[22]}/output": "3", POLLS[23]: "Yes"}
    data = [streaming(PROACTIVE)]
    result = convert(tmp_path, "streamingbench_proactive", data, answers(replies))
    [entry] = json.loads(result.text)
    said = entry["questions"][0]["Ours"]
    assert said["answered"] == 22
    turns = [(turn["role"], turn["content"], turn["time"]) for turn in said["dialog_history"]]
    assert turns == [
        ("user", "asked?", 21),
        ("assistant", "No.", 21),
        ("user", "asked?", 22),
        ("assistant", "Yes", 22),
        ("user", "asked?", 22),
        ("assistant", "3", 22),
    ]
    assert said["dialog_history"][-1]["cost"] == 1.5


def test_proactive_json_without_a_yes_ends_with_the_last_poll(tmp_path: Path) -> None:
    given = answers(dict.fromkeys(POLLS.values(), "No."))
    result = convert(tmp_path, "streamingbench_proactive", [streaming(PROACTIVE)], given)
    said = json.loads(result.text)[0]["questions"][0]["Ours"]
    assert said["answered"] is False
    assert said["dialog_history"][-1]["time"] == 25


def test_proactive_json_with_a_poll_unanswered_has_no_dialogue(tmp_path: Path) -> None:
    given = answers({POLLS[21]: "No.", POLLS[23]: "Yes"})
    result = convert(tmp_path, "streamingbench_proactive", [streaming(PROACTIVE)], given)
    assert "Ours" not in json.loads(result.text)[0]["questions"][0]
    assert result.missing == ("sample_1/0",)


def ovo(number: int, task: str, **fields: Any) -> dict[str, Any]:
    return {"id": number, "task": task, "video": "Ego4D/x.mp4"} | fields


CHOSEN = {"realtime": 5, "question": "What?", "answer": "-", "options": ["x y", "z", "w"], "gt": 2}
COUNTED: dict[str, Any] = {
    "activity": "jump",
    "start_times": [1],
    "end_times": [2],
    "test_info": [{"realtime": 3, "count": 1}, {"realtime": 4, "count": 2}],
}
STEPS = {
    "tutorial": "Bake",
    "all_steps": ["mix"],
    "start_time": [1],
    "end_time": [2],
    "test_info": [
        {"realtime": 1, "step": "mix", "type": 1},
        {"realtime": 9, "step": "mix", "type": 0},
    ],
}


def test_ovobench_json_has_three_parts_with_responses(tmp_path: Path) -> None:
    data = [
        ovo(0, "EPM", **CHOSEN),
        ovo(1, "OCR", **CHOSEN),
        ovo(2, "REC", **COUNTED),
        ovo(3, "SSR", **STEPS),
        ovo(4, "ATR", **CHOSEN),
    ]
    replies = {"0": "(C", "1": "Cannot tell", "2_0": "One time", "2_1": "many", "3_0": "yes."}
    result = convert(tmp_path, "ovobench", data, answers(replies))
    written = json.loads(result.text)
    assert written["backward"] == [
        {
            "id": 0,
            "task": "EPM",
            "video": "Ego4D/x.mp4",
            "question": "What?",
            "response": "C",
            "ground_truth": "C",
        }
    ]
    assert [(entry["id"], entry["response"]) for entry in written["realtime"]] == [(1, None)]
    counted, steps = written["forward"]
    assert [query["response"] for query in counted["test_info"]] == ["1", None]
    assert counted["test_info"][0] == COUNTED["test_info"][0] | {"response": "1"}
    assert [query["response"] for query in steps["test_info"]] == ["Yes"]
    assert (result.num_answered, result.missing) == (5, ("3_1", "4"))


def test_result_file_replaces_what_was_there_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("old")
    write_result(Result("neu – 新\n", 1, ()), path)
    assert path.read_text(encoding="utf-8") == "neu – 新\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["nowhere/results.csv", "file/results.csv", "folder"])
def test_result_file_that_cannot_be_written_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"result to .*: "):
        write_result(Result("text", 1, ()), tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
