"""Questions about a stream from other processes of the machine, while it plays and later."""

import json
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, redirect_stderr
from pathlib import Path
from typing import Any, TextIO

import pytest

from offload.cli import main
from offload.errors import ConfigError
from offload.sessions.store import SessionStore
from offload.video.badge_adapter import badge_adapter
from offload.video.badge_world import make_stream, write_mp4
from offload.video.encoder import StreamEncoder
from offload.video.question_socket import QuestionSocket
from offload.video.stream import VideoStream
from offload.video.stream_follower import StreamFollower
from offload.video.stream_session import StreamSession
from offload.video.types import Answer, Question

pytest.importorskip("av")
pytestmark = pytest.mark.leaks

_WAIT_S = 30.0
FRAMES, SEED = 60, 3


def tiers(folder: Path) -> list[str]:
    return ["--capacity", "gpu=192KiB,disk=64MiB", "--disk-path", str(folder)]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "badges.mp4"
    write_mp4(path, make_stream(FRAMES, SEED)[0])
    return path


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    return make_stream(FRAMES, SEED)[1]


class Client:
    """Somebody who asks."""

    def __init__(self, address: str) -> None:
        if address.startswith("unix:"):
            self.peer = socket.socket(socket.AF_UNIX)
            self.peer.connect(address.removeprefix("unix:"))
        else:
            host, _, port = address.rpartition(":")
            self.peer = socket.create_connection((host.strip("[]"), int(port)))
        self.peer.settimeout(_WAIT_S)
        self._lines = self.peer.makefile("rb")

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._lines.close()
        self.peer.close()

    def ask(self, **fields: Any) -> None:
        self.peer.sendall(json.dumps(fields).encode() + b"\n")

    def hear(self) -> Any:
        """Return the next line, None when the other side has hung up."""
        line = self._lines.readline()
        return json.loads(line) if line else None


@pytest.fixture
def asked() -> Iterator[QuestionSocket]:
    with QuestionSocket("127.0.0.1:0", max_clients=2, max_waiting=2, max_line_bytes=200) as opened:
        yield opened


def answer_to(question: Question) -> Answer:
    return Answer(question, f"about {question.text}")


def test_several_clients_get_their_own_answers_under_their_own_ids(asked: QuestionSocket) -> None:
    with Client(asked.address) as one, Client(asked.address) as other:
        one.ask(id="a", question="one", t="0:10")
        first = asked.take()
        other.ask(id="a", question="other")
        second = asked.take()
        assert first.id != second.id
        assert (first.text, first.time_s, second.time_s) == ("one", 10.0, None)
        asked.give(answer_to(second), video_id="lobby")
        asked.give(answer_to(first))
        assert one.hear()["answer"] == "about one"
        heard = other.hear()
        assert (heard["id"], heard["answer"], heard["video"]) == ("a", "about other", "lobby")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"what?\n", "not JSON"),
        (b'{"id": "a", "t": 3}\n', "'question'"),
        (b'["question"]\n', "expected an object"),
        (b"\xff\n", "utf-8"),
    ],
)
def test_line_that_is_no_question_is_told_so_and_the_next_one_counts(
    asked: QuestionSocket, line: bytes, reason: str
) -> None:
    with Client(asked.address) as client:
        client.peer.sendall(line)
        assert reason in client.hear()["error"]
        client.ask(question="well then")
        question = asked.take()
        asked.refuse(question, "the disk is gone")
        assert client.hear() == {"id": "q2", "error": "the disk is gone"}


def test_line_without_end_is_refused_and_its_client_let_go(asked: QuestionSocket) -> None:
    with Client(asked.address) as client:
        client.peer.sendall(b"x" * 201)
        assert "more than 200 bytes" in client.hear()["error"]
        assert client.hear() is None


def test_questions_beyond_what_may_wait_are_refused_and_the_others_answered(
    asked: QuestionSocket,
) -> None:
    with Client(asked.address) as client:
        for name in "abc":
            client.ask(id=name, question="?")
        heard = client.hear()
        assert (heard["id"], "2 questions wait" in heard["error"]) == ("c", True)
        for question in asked.take_all():
            asked.give(answer_to(question))
        assert [client.hear()["id"] for _ in range(2)] == ["a", "b"]


def test_client_that_has_said_all_still_gets_its_answers(asked: QuestionSocket) -> None:
    with Client(asked.address) as client:
        client.ask(id="a", question="?")
        client.peer.shutdown(socket.SHUT_WR)
        asked.give(answer_to(asked.take()))
        assert client.hear()["id"] == "a"
        assert client.hear() is None


def test_client_beyond_the_limit_is_told_and_let_go(asked: QuestionSocket) -> None:
    with Client(asked.address) as one, Client(asked.address) as two, Client(asked.address) as three:
        assert "2 clients" in three.hear()["error"]
        assert three.hear() is None
        for client in (one, two):
            client.ask(question="?")
            asked.give(answer_to(asked.take()))
            assert client.hear()["id"] == "q1"


def test_closing_refuses_what_waits_and_leaves_no_socket_behind(tmp_path: Path) -> None:
    path = tmp_path / "questions"
    left_behind = socket.socket(socket.AF_UNIX)
    left_behind.bind(str(path))
    left_behind.close()
    asked = QuestionSocket(f"unix:{path}")
    assert path.stat().st_mode & 0o777 == 0o600
    with Client(asked.address) as client:
        client.ask(id="a", question="?")
        first = asked.take()
        client.ask(id="b", question="?")
        while asked._waiting.empty():
            pass
        with pytest.raises(ConfigError, match="in use"):
            QuestionSocket(f"unix:{path}")
        asked.close("the stream has ended")
        asked.give(answer_to(first))
        assert client.hear() == {"id": "b", "error": "the stream has ended"}
        assert client.hear() is None
    assert not path.exists()


@pytest.mark.parametrize(
    "address", ["0.0.0.0:1", "192.168.0.1:80", "example.org:80", "8000", "unix:", "127.0.0.1:x"]
)
def test_address_that_others_could_reach_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="only this machine can reach"):
        QuestionSocket(address)


def address_in(lines: TextIO) -> str:
    told = []
    for line in lines:
        found = re.search(r"answered at (\S+)", line)
        if found:
            return found[1]
        told.append(line)
    raise AssertionError(f"it did not listen: {told}")


def command(talk: Callable[[Client], object], *arguments: str) -> int:
    """Run a command while a client talks to it; then end it by a signal."""
    reading, writing = os.pipe()

    def converse() -> None:
        with os.fdopen(reading) as lines:
            try:
                with Client(address_in(lines)) as client:
                    talk(client)
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                lines.read()  # or what it says last would meet a broken pipe

    # A command that has ended by itself must not leave the signal to the tests.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with ThreadPoolExecutor(1) as pool:
            talking = pool.submit(converse)
            with os.fdopen(writing, "w", buffering=1) as said, redirect_stderr(said):
                status = main(["video", *arguments])
            talking.result(_WAIT_S)
    finally:
        signal.signal(signal.SIGTERM, before)
    return status


def test_stream_is_asked_while_it_is_encoded(
    video: Path, questions: list[Question], tmp_path: Path
) -> None:
    def talk(client: Client) -> None:
        client.ask(id="never", question=questions[0].text, t=1e6)
        client.ask(id="now", question=questions[0].text)
        answer = client.hear()
        assert (answer["id"], answer["video"]) == ("now", str(video))
        assert 0 < answer["frames_seen"] < FRAMES

    out = tmp_path / "answers.jsonl"
    options = ["--realtime", "--listen", "127.0.0.1:0", "--out", str(out)]
    assert command(talk, "run", str(video), *options, *tiers(tmp_path)) == 0
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["1/now"]


def test_saved_stream_is_asked_about_its_past(
    video: Path, questions: list[Question], tmp_path: Path
) -> None:
    asked = questions[0]
    [(_, seen_s)] = asked.windows

    def talk(client: Client) -> None:
        for at_s in (seen_s - 1, seen_s):
            client.ask(question=asked.text, t=at_s)
        early, late = client.hear(), client.hear()
        assert early["frames_seen"] == seen_s - 1
        assert all(frame["t"] < seen_s - 1 for frame in early["evidence"])
        assert (late["answer"], late["frames_seen"]) == (asked.answer, seen_s)
        assert 0 < late["coverage"] <= 1
        parts = late["retrieval_ms"] + late["load_ms"] + late["model_ms"]
        assert parts == pytest.approx(late["ttft_ms"])
        assert set(late["bytes_from"]) == {"disk"}

    common = ["--root", str(tmp_path / "root"), *tiers(tmp_path)]
    assert main(["video", "encode", "lobby", str(video), *common]) == 0
    listening = ["--listen", f"unix:{tmp_path}/asked"]
    assert command(talk, "ask", "lobby", *listening, *common) == 0
    assert not (tmp_path / "asked").exists()


def test_stream_that_another_process_goes_on_with_is_opened_anew(tmp_path: Path) -> None:
    frames = list(make_stream(FRAMES, SEED)[0])
    options: dict[str, Any] = {
        "tiers": ["gpu", "disk"],
        "capacity": {"gpu": "192KiB", "disk": "64MiB"},
        "disk_path": tmp_path,
    }
    adapter = badge_adapter()
    with SessionStore(tmp_path / "root") as store, SessionStore(tmp_path / "root") as other:
        stream = VideoStream(adapter, **options)
        with closing(StreamSession(stream, "lobby", store)) as session:
            encoder = StreamEncoder(stream, 96)
            encoder.add(frames[:20])
            session.save()
            follower = StreamFollower(adapter, "lobby", other, refresh_s=0, **options)
            with closing(follower):
                assert not follower.refresh()
                encoder.add(frames[20:])
                session.save()
                assert follower.refresh()
                assert follower.session.stream.units.num_frames == FRAMES
                assert not follower.refresh()
