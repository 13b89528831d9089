"""BadgeWorld through everything: a real video file, tiers, retrieval, answers, sessions."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from offload.cli import main
from offload.errors import NamespaceMismatch, SessionNotFound
from offload.sessions.store import SessionStore
from offload.video.answerer import Answerer
from offload.video.badge_adapter import badge_adapter
from offload.video.badge_world import make_stream, write_mp4
from offload.video.encoder import StreamEncoder
from offload.video.llava_onevision import LlavaOnevision
from offload.video.retrieval import RetrievalPlan
from offload.video.sources import open_source
from offload.video.stream import VideoStream
from offload.video.stream_session import StreamSession
from offload.video.types import Answer, Question

pytest.importorskip("av")

FRAMES, SEED, WINDOW = 240, 3, 96
DISK: dict[str, Any] = {"tiers": ["gpu", "disk"], "capacity": {"gpu": "192KiB", "disk": "64MiB"}}
MEMORY: dict[str, Any] = {"tiers": ["gpu"], "capacity": {"gpu": "64MiB"}}


@pytest.fixture(scope="module")
def adapter() -> LlavaOnevision:
    return badge_adapter()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "badges.mp4"
    write_mp4(path, make_stream(FRAMES, SEED)[0])
    return path


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return make_stream(FRAMES, SEED)[1]


def encoded(
    adapter: LlavaOnevision, video: Path, folder: Path, options: dict[str, Any]
) -> VideoStream:
    stream = VideoStream(
        adapter, disk_path=folder if "disk" in options["tiers"] else None, **options
    )
    with open_source(video) as source:
        for _ in StreamEncoder(stream, WINDOW).extend(source):
            pass
    return stream


@pytest.fixture(scope="module")
def stream(
    adapter: LlavaOnevision, video: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[VideoStream]:
    with closing(encoded(adapter, video, tmp_path_factory.mktemp("disk"), DISK)) as opened:
        opened.store.flush()
        yield opened


def ask(stream: VideoStream, questions: list[Question], plan: RetrievalPlan) -> list[Answer]:
    answerer = Answerer(stream, plan, max_tokens=2)
    return [answerer.ask(question) for question in questions]


def share_right(answers: list[Answer]) -> float:
    return sum(answer.text == answer.question.answer for answer in answers) / len(answers)


def told(answers: list[Answer]) -> list[tuple[Any, ...]]:
    return [(answer.text, answer.evidence, answer.num_frames) for answer in answers]


def gist(answers: list[Answer]) -> list[tuple[Any, ...]]:
    """Return what rounding does not change: frames that come in other pieces are rounded apart."""
    return [(each.text, each.evidence[0].frame, each.num_frames) for each in answers]


def test_few_frames_answer_and_are_shown_first_while_the_window_does_not(
    stream: VideoStream, questions: list[Question]
) -> None:
    found = ask(stream, questions, RetrievalPlan("tokmax", 4, 1))
    assert share_right(found) >= 0.9
    firsts = [answer.evidence[0].time_s for answer in found]
    windows = [answer.question.windows[0] for answer in found]
    shown = [start <= at <= end for at, (start, end) in zip(firsts, windows, strict=True)]
    assert sum(shown) >= 0.9 * len(shown)
    assert share_right(ask(stream, questions, RetrievalPlan("recent", WINDOW // 4, 0))) <= 0.5
    assert all(answer.bytes_from.get("disk", 0) > 0 for answer in found)


def test_answers_from_disk_are_those_from_memory(
    adapter: LlavaOnevision,
    video: Path,
    stream: VideoStream,
    questions: list[Question],
    tmp_path: Path,
) -> None:
    plan = RetrievalPlan("tokmax", 6, 1)
    with closing(encoded(adapter, video, tmp_path, MEMORY)) as resident:
        assert told(ask(resident, questions[:8], plan)) == told(ask(stream, questions[:8], plan))


def test_question_sees_only_frames_before_its_time(
    stream: VideoStream, questions: list[Question]
) -> None:
    late = max(questions, key=lambda each: each.windows[0][0])
    at = late.windows[0][0]
    early = Question("early", late.text, at)
    [answer] = ask(stream, [early], RetrievalPlan("tokmax", 8, 1))
    assert answer.num_frames == round(at)
    assert all(frame.time_s < at for frame in answer.evidence)


def test_asking_changes_nothing_of_the_stream(
    stream: VideoStream, questions: list[Question]
) -> None:
    plan = RetrievalPlan("rekv", 4, 0)
    first = told(ask(stream, questions[:4], plan))
    ask(stream, questions[4:8], RetrievalPlan("tokmax", 8, 2, is_consensus=True))
    assert told(ask(stream, questions[:4], plan)) == first


@pytest.mark.parametrize("is_twice", [False, True])
def test_question_may_go_through_the_model_once_or_twice(
    stream: VideoStream, questions: list[Question], is_twice: bool
) -> None:
    answerer = Answerer(stream, RetrievalPlan("rekv", 8, 0), max_tokens=2, is_twice=is_twice)
    assert share_right([answerer.ask(question) for question in questions[:10]]) >= 0.8


_ENCODER = """
import sys
from itertools import islice
from offload.sessions.store import SessionStore
from offload.video.badge_adapter import badge_adapter
from offload.video.encoder import StreamEncoder
from offload.video.sources import open_source
from offload.video.stream import VideoStream
from offload.video.stream_session import StreamSession
video, root, disk = sys.argv[1:]
stream = VideoStream(badge_adapter(), tiers=["gpu", "disk"],
                     capacity={"gpu": "192KiB", "disk": "64MiB"}, disk_path=disk)
session = StreamSession(stream, "lobby", SessionStore(root))
encoder = StreamEncoder(stream, 96)
with open_source(video) as source:
    encoder.add(list(islice(source, 150)))
    session.save()
    encoder.add(list(islice(source, 20)))
    print("encoded", flush=True)
    sys.stdin.readline()
"""


def test_killed_encoder_leaves_what_it_saved_and_another_process_goes_on(
    adapter: LlavaOnevision,
    video: Path,
    stream: VideoStream,
    questions: list[Question],
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", _ENCODER, str(video), str(tmp_path / "root"), str(tmp_path)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "encoded\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with SessionStore(tmp_path / "root") as store:
        session = StreamSession.load(adapter, "lobby", store, **DISK, disk_path=tmp_path / "a")
        with closing(session):
            assert session.stream.units.num_frames == 150
            encoder = StreamEncoder(session.stream, WINDOW)
            with open_source(video) as source:
                encoder.add(list(islice(source, 150, None)))
            plan = RetrievalPlan("tokmax", 4, 1)
            found = ask(session.stream, questions, plan)
            assert gist(found) == gist(ask(stream, questions, plan))
            assert len(session.stream.thumbnails) == FRAMES
            session.save()
        sizes = {"gpu": "192KiB", "cpu": "8MiB", "disk": "64MiB"}
        roomy: dict[str, Any] = {"tiers": list(sizes), "capacity": sizes}
        again = StreamSession.load(adapter, "lobby", store, **roomy, disk_path=tmp_path / "c")
        with closing(again):
            assert told(ask(again.stream, questions, plan)) == told(found)
        with pytest.raises(SessionNotFound):
            StreamSession.load(adapter, "hall", store, **DISK, disk_path=tmp_path / "b")


def test_session_that_is_no_stream_is_refused(adapter: LlavaOnevision, tmp_path: Path) -> None:
    with SessionStore(tmp_path) as store:
        stream = VideoStream(adapter, **DISK, disk_path=tmp_path / "disk")
        encoder = StreamEncoder(stream, WINDOW)
        frames, _ = make_stream(20, SEED)
        encoder.add(list(frames))
        with closing(StreamSession(stream, "lobby", store)) as session:
            session.save()
        other = badge_adapter()
        other.model.model.language_model.norm.weight.data += 1
        with pytest.raises(NamespaceMismatch, match="weights"):
            StreamSession.load(other, "lobby", store, **DISK, disk_path=tmp_path / "disk")


def test_commands_encode_ask_draw_and_go_on(
    video: Path, questions: list[Question], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = tmp_path / "asked.jsonl"
    lines = [
        {"id": each.id, "question": each.text, "t": each.time_s, "answer": each.answer}
        for each in questions[:3]
    ]
    asked.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tiers = ["--capacity", "gpu=192KiB,disk=64MiB", "--disk-path", str(tmp_path / "disk")]
    root = ["--root", str(tmp_path / "root")]
    common = [*root, *tiers]
    assert main(["video", "encode", "lobby", str(video), "--window", "96", *common]) == 0
    assert main(["video", "encode", "lobby", str(video), *common]) == 2
    assert "offload video resume" in capsys.readouterr().err
    out, pictures = tmp_path / "answers.jsonl", tmp_path / "pictures"
    ask_file = ["video", "ask", "lobby", "--questions", str(asked), "--out", str(out)]
    assert main([*ask_file, "--evidence", str(pictures), *common]) == 0
    answered = [json.loads(line) for line in out.read_text().splitlines()]
    assert [each["id"] for each in answered] == [each.id for each in questions[:3]]
    assert [each["answer"] for each in answered] == [each.answer for each in questions[:3]]
    assert len(list(pictures.glob("*.png"))) == 6
    assert main([*ask_file, *common]) == 0
    assert len(out.read_text().splitlines()) == 3
    drawn = tmp_path / "drawn"
    assert main(["video", "viz", "lobby", str(out), str(drawn), *root]) == 0
    assert {each.name for each in drawn.iterdir()} == {each.name for each in pictures.iterdir()}
    assert main(["video", "resume", "lobby", str(video), "--window", "96", *common]) == 0
    run = ["video", "run", str(video), "--window", "96", "--questions", str(asked), *tiers]
    capsys.readouterr()
    assert main(run) == 0
    shown = capsys.readouterr().out
    assert all(each.answer in shown for each in questions[:3] if each.answer)
