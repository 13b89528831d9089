"""``offload video eval`` from annotations in the official shapes to official result files."""

import csv
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from offload.cli import main
from offload.video.badge_model import load_badge_model
from offload.video.badge_world import COLOURS, make_stream, write_mp4
from offload.video.types import Question

pytest.importorskip("av")

FRAMES, SEED = 48, 5
MODEL = "llava_onevision"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with one video, ``videos/sample_1_real.mp4``."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "videos").mkdir()
    write_mp4(folder / "videos" / "sample_1_real.mp4", make_stream(FRAMES, SEED)[0])
    return folder


QUESTIONS = make_stream(FRAMES, SEED)[1]
VIDEO = "videos/sample_1_real.mp4"


def choices_of(question: Question) -> list[str]:
    others = [colour for colour in COLOURS if colour != question.answer][:3]
    return [*others[:1], str(question.answer), *others[1:]]


def rekv(field: Callable[[Question], dict[str, Any]]) -> list[dict[str, Any]]:
    asked = [{"question": q.text, "answer": q.answer, **field(q)} for q in QUESTIONS]
    return [{"video_id": "one", "video_path": VIDEO, "duration": FRAMES, "conversations": asked}]


def open_ended(question: Question) -> dict[str, Any]:
    return {"start_time": 0, "end_time": question.time_s}


def multiple_choice(question: Question) -> dict[str, Any]:
    return {"choices": choices_of(question), "question_type": "plotQA"}


def grounded(question: Question) -> dict[str, Any]:
    return {"choices": choices_of(question), "temporal_windows": [list(question.windows[0])]}


def streamingbench() -> list[dict[str, Any]]:
    asked = [
        {
            "task_type": "Object Recognition",
            "question": q.text,
            "time_stamp": f"00:00:{int(q.time_s or 0):02d}",
            "answer": "B",
            "options": [f"{letter}. {c}" for letter, c in zip("ABCD", choices_of(q), strict=True)],
            "required_ability": "episodic memory",
        }
        for q in QUESTIONS
    ]
    return [{"time": "[0:00:00 - 0:00:48]", "questions": asked, "video_path": f"./{VIDEO}"}]


def ovobench() -> list[dict[str, Any]]:
    common = {"video": VIDEO}
    backward = [
        common
        | {"id": n, "task": "EPM", "realtime": q.time_s, "question": q.text, "answer": q.answer}
        | {"options": choices_of(q), "gt": 1}
        for n, q in enumerate(QUESTIONS)
    ]
    info = [{"realtime": 10, "count": 1, "type": 0, "step": "run"}]
    forward = [
        common | {"id": 90, "task": "REC", "activity": "run", "test_info": info},
        common | {"id": 91, "task": "SSR", "tutorial": "Run", "test_info": info},
        common | {"id": 92, "task": "CRR", "question": "Who ran?", "test_info": info},
    ]
    return [*backward, backward[0] | {"id": 80, "task": "OCR"}, *forward]


def evaluate(
    dataset: str, annotations: object, root: Path, folder: Path, *options: str
) -> tuple[str, list[dict[str, Any]]]:
    """Return the content of the result file, and the answers."""
    given, out, results = folder / "given.json", folder / "answers.jsonl", folder / "results"
    given.write_text(json.dumps(annotations))
    command = ["video", "eval", dataset, str(given), "--data-root", str(root), "--out", str(out)]
    tiers = ["--capacity", "gpu=192KiB,disk=64MiB", "--disk-path", str(folder)]
    asked = ["--fps", "1", "--window", "96", "--max-tokens", "2"]
    assert main([*command, *tiers, *asked, "--results", str(results), *options]) == 0
    return results.read_text(), [json.loads(line) for line in out.read_text().splitlines()]


@pytest.mark.parametrize("dataset", ["rvs_ego", "rvs_movie", "activitynet_qa"])
def test_open_questions_come_out_as_the_csv_of_rekv(
    dataset: str, root: Path, tmp_path: Path
) -> None:
    text, _ = evaluate(dataset, rekv(open_ended), root, tmp_path)
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["question"] for row in rows] == [q.text for q in QUESTIONS]
    assert [row["pred_answer"] for row in rows] == [q.answer for q in QUESTIONS]


@pytest.mark.parametrize("dataset", ["mlvu", "cgbench"])
def test_choices_come_out_as_the_csv_of_rekv_with_their_scores(
    dataset: str, root: Path, tmp_path: Path
) -> None:
    text, _ = evaluate(dataset, rekv(multiple_choice), root, tmp_path)
    rows = list(csv.DictReader(text.splitlines()))
    assert {(row["pred_choice"], row["correct_choice"]) for row in rows} == {("B", "B")}
    assert {(float(row["qa_acc"]), row["task"]) for row in rows} == {(100.0, "plotQA")}


def test_qaego4d_tells_how_much_of_the_evidence_was_retrieved(root: Path, tmp_path: Path) -> None:
    text, answers = evaluate("qaego4d", rekv(grounded), root, tmp_path)
    rows = list(csv.DictReader(text.splitlines()))
    assert [float(row["recall"]) for row in rows] == [100.0] * len(QUESTIONS)
    assert all(0 < float(row["precision"]) < 100 for row in rows)
    assert all(each["frames_seen"] == FRAMES for each in answers)


def test_egoschema_comes_out_as_places(root: Path, tmp_path: Path) -> None:
    text, _ = evaluate("egoschema", rekv(multiple_choice)[:1], root, tmp_path)
    header, *rows = text.split()
    assert header == "q_uid,answer"
    assert [row.partition(",")[2] for row in rows] == ["1"] * len(rows)


@pytest.mark.parametrize("kind", ["real", "omni"])
def test_streamingbench_gets_a_letter_in_each_question(
    kind: str, root: Path, tmp_path: Path
) -> None:
    text, answers = evaluate(f"streamingbench_{kind}", streamingbench(), root, tmp_path)
    [entry] = json.loads(text)
    assert [question[MODEL] for question in entry["questions"]] == ["B"] * len(QUESTIONS)
    assert all(each["frames_seen"] == each["t"] for each in answers)


def test_streamingbench_in_sequence_is_told_earlier_answers(root: Path, tmp_path: Path) -> None:
    text, answers = evaluate("streamingbench_sqa", [streamingbench()], root, tmp_path)
    [[entry]] = json.loads(text)
    assert all(question[MODEL] in "ABCD?" for question in entry["questions"])
    assert "Asked and answered earlier" in answers[1]["question"]


def test_ovobench_gets_responses_in_all_three_parts(root: Path, tmp_path: Path) -> None:
    text, answers = evaluate("ovobench", ovobench(), root, tmp_path)
    parts = json.loads(text)
    assert [each["response"] for each in parts["backward"]] == ["B"] * len(QUESTIONS)
    assert [each["response"] for each in parts["realtime"]] == ["B"]
    assert [len(each["test_info"]) for each in parts["forward"]] == [1, 1, 1]
    assert len(answers) == len(QUESTIONS) + 4


def agreeable_model(folder: Path) -> Path:
    """Save the model of BadgeWorld with all its colours called yes, each in another spelling."""
    model, tokenizer = load_badge_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer.json"
    spellings = ["yes", "Yes", "yEs", "yeS", "YEs", "yES", "YeS", "YES"]
    said = path.read_text()
    for colour, spelling in zip(COLOURS, spellings, strict=True):
        said = said.replace(f'"{colour}"', f'"{spelling}"')
    path.write_text(said)
    return folder


def test_proactive_question_is_followed_up_after_a_yes(root: Path, tmp_path: Path) -> None:
    question = {
        "task_type": "Proactive Output",
        "question": 'When a badge is shown, output "badge".',
        "time_stamp": "00:00:20",
        "ground_truth_time_stamp": "00:00:22",
        "ground_truth_output": "badge",
        "required_ability": "working memory",
    }
    annotations = [{"questions": [question], "video_path": f"./{VIDEO}"}]
    model = ["--model", str(agreeable_model(tmp_path / "model"))]
    text, answers = evaluate("streamingbench_proactive", annotations, root, tmp_path, *model)
    [entry] = json.loads(text)
    told = entry["questions"][0][MODEL]
    assert told["answered"]
    assert [each["id"] for each in answers[:2]] == [
        "sample_1_real/0@21",
        "sample_1_real/0@21/output",
    ]
    assert answers[1]["question"] == question["question"]


def test_run_that_was_interrupted_asks_what_is_left(root: Path, tmp_path: Path) -> None:
    run = partial(evaluate, "mlvu", rekv(multiple_choice), root, tmp_path)
    _, answers = run()
    out = tmp_path / "answers.jsonl"
    kept = out.read_text().splitlines(keepends=True)[:2]
    out.write_text("".join(kept) + '{"id": "torn')
    assert [each["id"] for each in run()[1]] == [each["id"] for each in answers]
    assert out.read_text().splitlines(keepends=True)[:2] == kept


def test_frames_may_be_chosen_by_the_scores_of_another_model(root: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.jsonl"
    lines = [{"question": q.text, "frame": int(q.windows[0][0]), "score": 0.7} for q in QUESTIONS]
    scores.write_text("".join(json.dumps(line) + "\n" for line in lines))
    chosen = ["--frames", str(scores), "--units", "2", "--recent", "1"]
    _, answers = evaluate("rvs_ego", rekv(open_ended), root, tmp_path, *chosen)
    assert [each["answer"] for each in answers] == [q.answer for q in QUESTIONS]
    assert all(len(each["evidence"]) == 2 for each in answers)
    assert {each["settings"]["mode"] for each in answers} == {"external"}
